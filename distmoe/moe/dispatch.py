"""Dispatch: brings tokens to their experts and the outputs back. Here on one device; over processes in ``parallel/``.

Dispatchers are interchangeable: for the same arguments, outputs and gradients are equal. The experts see their rows
grouped by expert id, and inside an expert by (source rank, row), so that the order of summation does not depend on who
sent what. A plan holds integers only and is returned, never kept: recomputation and several micro-batches in flight
work.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from distmoe.moe.sums import Reducer, no_reduction

Tensors = TypeVar("Tensors", Tensor, tuple[Tensor, ...])
Meanwhile = Callable[[], object]
"""Work that does not need the rows; its result is not looked at."""


class Dispatcher(Protocol):
    """Two ways there and back."""

    def dispatch(
        self, x_T: Tensor, row_ids_A: Tensor, expert_ids_A: Tensor, meanwhile: Meanwhile | None = None
    ) -> tuple[Tensor, Tensor, Any]:
        """Send each assignment's row to its expert.

        Args:
            x_T: (T, ...) tokens.
            row_ids_A: (A,) int64 in [0, T).
            expert_ids_A: (A,) int64 in [0, E).
            meanwhile: May be called while rows travel, or not at all.

        Returns:
            ``rows_R`` (R, ...) for this rank's experts, ``rows_per_expert_L`` (L,) int64 on the CPU, and the plan for
            the way back.
        """
        ...

    def gather(self, outputs: Tensors, plan: Any) -> Tensors:
        """Outputs (R, ...), one tensor or a tuple of them, back in assignment order (A, ...)."""
        ...

    def combine(self, outputs: Tensor, plan: Any, weights_A: Tensor) -> Tensor:
        """(T, ...): for each token the sum of its outputs times their weights, in float32 or wider.

        Equals the weighted index-add of :meth:`gather`. A token without an assignment gets zeros.
        """
        ...


@dataclass(frozen=True)
class RowMap:
    """From rows to places, each of which shows one row: copies there, sums back. Integers only.

    Attributes:
        num_rows: T.
        row_ids_P: (P,) int64 row of each place.
        places_P: (P,) the places, row by row, those of one row in ascending order.
        starts_T: (T,) where each row's part of ``places_P`` begins.
    """

    num_rows: int
    row_ids_P: Tensor
    places_P: Tensor
    starts_T: Tensor

    @staticmethod
    def of(row_ids_P: Tensor, num_rows: int) -> "RowMap":
        """The map of places to rows in [0, num_rows)."""
        sorted_P, places_P = row_ids_P.sort(stable=True)
        rows_T = torch.arange(num_rows, device=row_ids_P.device)
        return RowMap(num_rows, row_ids_P, places_P, starts_T=torch.searchsorted(sorted_P, rows_T))

    def take(self, x_T: Tensor) -> Tensor:
        """(P, ...): each row at its places."""
        taken: Tensor = _Take.apply(x_T, self)
        return taken

    def add(self, values_P: Tensor, weights_P: Tensor | None = None) -> Tensor:
        """(T, ...): for each row the sum over its places of value times weight, if any, in the wider dtype.

        Weights are (P,), or (P, C, ...) with one for each of the values' first axes.
        """
        if weights_P is not None and weights_P.dim() > 1:  # one a filter or a position
            values_P = values_P * weights_P.view(weights_P.shape + (1,) * (values_P.dim() - weights_P.dim()))
            weights_P = None
        added: Tensor = _Add.apply(values_P, weights_P, self)
        return added


def counts(ids_A: Tensor, num_ids: int) -> Tensor:
    """(num_ids,) how often each id occurs: ``bincount`` without its wait for the GPU."""
    return ids_A.new_zeros(num_ids).scatter_add_(0, ids_A, torch.ones_like(ids_A))


def inverse(order_A: Tensor) -> Tensor:
    """(A,) where each entry of a permutation went."""
    back_A = torch.empty_like(order_A)
    back_A[order_A] = torch.arange(len(order_A), device=order_A.device)
    return back_A


@dataclass(frozen=True)
class LocalPlan:
    """The way back of :class:`LocalDispatcher`: integers only.

    Attributes:
        order_A: Assignment of each place among the experts' rows.
        rows: From tokens to those places.
    """

    order_A: Tensor
    rows: RowMap


class LocalDispatcher:
    """All experts on this device.

    Only ``index_select``, ``index_add`` and ``embedding_bag`` are used: on two CPU threads the backward of ``x[ids]``
    differs from run to run in the last bits.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(
        self, x_T: Tensor, row_ids_A: Tensor, expert_ids_A: Tensor, meanwhile: Meanwhile | None = None
    ) -> tuple[Tensor, Tensor, LocalPlan]:
        """See :class:`Dispatcher`; R equals A and L equals E, and nothing travels."""
        del meanwhile
        order_A = expert_order(row_ids_A, expert_ids_A, len(x_T))
        plan = LocalPlan(order_A, RowMap.of(row_ids_A.index_select(0, order_A), len(x_T)))
        rows_per_expert_L = counts(expert_ids_A, self.num_experts).cpu()  # sync: the experts split by it
        return plan.rows.take(x_T), rows_per_expert_L, plan

    def gather(self, outputs: Tensors, plan: LocalPlan) -> Tensors:
        """See :class:`Dispatcher`."""
        back_A = inverse(plan.order_A)
        if isinstance(outputs, tuple):
            return tuple(output.index_select(0, back_A) for output in outputs)
        return outputs.index_select(0, back_A)

    def combine(self, outputs: Tensor, plan: LocalPlan, weights_A: Tensor) -> Tensor:
        """See :class:`Dispatcher`."""
        return plan.rows.add(outputs, weights_A.index_select(0, plan.order_A))


def expert_order(row_ids_A: Tensor, expert_ids_A: Tensor, num_rows: int) -> Tensor:
    """(A,) the assignments by expert id, and inside an expert by row."""
    return (expert_ids_A * num_rows + row_ids_A).argsort(stable=True)


class _Take(Function):
    """Tokens at their places. Its backward is :class:`_Add`, which sums without filling a tensor with zeros first."""

    @staticmethod
    def forward(ctx: Any, x_T: Tensor, rows: RowMap) -> Tensor:
        ctx.rows = rows
        return x_T.index_select(0, rows.row_ids_P)

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.add(grad_R), None


class _Add(Function):
    """Weighted sums of rows in one pass over them: several times faster than a product and an ``index_add``."""

    @staticmethod
    def forward(ctx: Any, values_R: Tensor, weights_R: Tensor | None, rows: RowMap) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(None if weights_R is None else values_R, weights_R)
        if weights_R is None:
            return _bags(values_R, rows.places_P, rows.starts_T, None)
        # Outputs in half precision are kept as they are, and widened here and in the backward pass only.
        dtype = torch.promote_types(values_R.dtype, weights_R.dtype)
        in_order_A = weights_R.to(dtype).index_select(0, rows.places_P)
        return _bags(values_R.to(dtype), rows.places_P, rows.starts_T, in_order_A)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, (values_R, weights_R) = ctx.rows, ctx.saved_tensors
        if weights_R is None:
            return rows.take(grad_T), None, None
        wide_R, dtype = values_R.to(grad_T.dtype), values_R.dtype
        if torch.is_grad_enabled():  # somebody differentiates twice: operations that can be
            grad_R = rows.take(grad_T)
            weights = weights_R.view(-1, *(1,) * (grad_R.dim() - 1))
            return (grad_R * weights).to(dtype), _as_matrix(grad_R * wide_R).sum(1).to(weights_R.dtype), None
        rows_R, each_R = rows.row_ids_P, torch.arange(len(values_R), device=values_R.device)
        grad_values_R, grad_weights_R = None, None
        if ctx.needs_input_grad[0]:
            grad_values_R = _bags(grad_T, rows_R, each_R, weights_R.to(grad_T.dtype)).to(dtype)
        if ctx.needs_input_grad[1]:
            grad_weights_R = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                _as_matrix(grad_T), _as_matrix(wide_R), each_R, each_R, rows_R, _SUM
            ).to(weights_R.dtype)
        return grad_values_R, grad_weights_R, None


_SUM = 0  # embedding_bag's number for it


def _bags(values: Tensor, ids_A: Tensor, starts: Tensor, weights_A: Tensor | None) -> Tensor:
    """Sums of the rows ``ids_A`` of values, one sum from each start to the next, each row times its weight."""
    sums = torch.embedding_bag(_as_matrix(values), ids_A, starts, False, _SUM, False, weights_A)[0]
    return sums.view(len(starts), *values.shape[1:])


def _as_matrix(x: Tensor) -> Tensor:
    return x.reshape(len(x), x.shape[1:].numel()).contiguous()  # a gradient may be expanded


@dataclass(frozen=True)
class Placement:
    """Which experts this rank holds and how tokens reach all of them; the default is one process.

    Attributes:
        local_experts: Number of experts -> the global ids of those on this rank.
        dispatcher: Number of experts -> the dispatcher that reaches all of them.
        reducer: Adds and gathers over all ranks, for gates whose routing groups reach over several of them.
    """

    local_experts: Callable[[int], range] = range
    dispatcher: Callable[[int], Dispatcher] = LocalDispatcher
    reducer: Reducer = no_reduction
