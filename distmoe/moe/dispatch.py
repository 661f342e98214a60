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

Tensors = TypeVar("Tensors", Tensor, tuple[Tensor, ...])


class Dispatcher(Protocol):
    """Two ways there and back."""

    def dispatch(self, x_T: Tensor, row_ids_A: Tensor, expert_ids_A: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Send each assignment's row to its expert.

        Args:
            x_T: (T, ...) tokens.
            row_ids_A: (A,) int64 in [0, T).
            expert_ids_A: (A,) int64 in [0, E).

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
class LocalPlan:
    """The way back of :class:`LocalDispatcher`: integers only.

    Attributes:
        num_rows: T.
        order_A: Assignment of each place among the experts' rows.
        sorted_row_ids_A: Token of each place.
        places_A: The places, token by token, those of one token in ascending order.
        starts_T: Where each token's part of ``places_A`` begins.
    """

    num_rows: int
    order_A: Tensor
    sorted_row_ids_A: Tensor
    places_A: Tensor
    starts_T: Tensor

    def take(self, x_T: Tensor) -> Tensor:
        """(R, ...): each token at its places."""
        taken: Tensor = _Take.apply(x_T, self)
        return taken

    def add(self, values_R: Tensor, weights_R: Tensor | None = None) -> Tensor:
        """(T, ...): for each token the sum over its places of value times weight, if any, in the wider dtype."""
        added: Tensor = _Add.apply(values_R, weights_R, self)
        return added


class LocalDispatcher:
    """All experts on this device.

    Only ``index_select``, ``index_add`` and ``embedding_bag`` are used: on two CPU threads the backward of ``x[ids]``
    differs from run to run in the last bits.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, x_T: Tensor, row_ids_A: Tensor, expert_ids_A: Tensor) -> tuple[Tensor, Tensor, LocalPlan]:
        """See :class:`Dispatcher`; R equals A and L equals E."""
        num_rows = len(x_T)
        order_A = (expert_ids_A * num_rows + row_ids_A).argsort(stable=True)
        sorted_row_ids_A = row_ids_A.index_select(0, order_A)
        rows_per_token_T = torch.bincount(row_ids_A, minlength=num_rows)
        plan = LocalPlan(
            num_rows,
            order_A,
            sorted_row_ids_A,
            places_A=sorted_row_ids_A.argsort(stable=True),
            starts_T=rows_per_token_T.cumsum(0) - rows_per_token_T,
        )
        rows_per_expert_L = torch.bincount(
            expert_ids_A, minlength=self.num_experts
        ).cpu()  # sync: the experts split by it
        return plan.take(x_T), rows_per_expert_L, plan

    def gather(self, outputs: Tensors, plan: LocalPlan) -> Tensors:
        """See :class:`Dispatcher`."""
        back_A = torch.empty_like(plan.order_A)
        back_A[plan.order_A] = torch.arange(len(back_A), device=back_A.device)
        if isinstance(outputs, tuple):
            return tuple(output.index_select(0, back_A) for output in outputs)
        return outputs.index_select(0, back_A)

    def combine(self, outputs: Tensor, plan: LocalPlan, weights_A: Tensor) -> Tensor:
        """See :class:`Dispatcher`."""
        weights_R = weights_A.index_select(0, plan.order_A)
        if weights_R.dim() > 1:  # one a filter or a position
            return plan.add(outputs * weights_R.view(weights_R.shape + (1,) * (outputs.dim() - weights_R.dim())))
        return plan.add(outputs, weights_R)


class _Take(Function):
    """Tokens at their places. Its backward is :class:`_Add`, which sums without filling a tensor with zeros first."""

    @staticmethod
    def forward(ctx: Any, x_T: Tensor, plan: LocalPlan) -> Tensor:
        ctx.plan = plan
        return x_T.index_select(0, plan.sorted_row_ids_A)

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, None]:
        return ctx.plan.add(grad_R), None


class _Add(Function):
    """Weighted sums of rows in one pass over them: several times faster than a product and an ``index_add``."""

    @staticmethod
    def forward(ctx: Any, values_R: Tensor, weights_R: Tensor | None, plan: LocalPlan) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(None if weights_R is None else values_R, weights_R)
        if weights_R is None:
            return _bags(values_R, plan.places_A, plan.starts_T, None)
        # Outputs in half precision are kept as they are, and widened here and in the backward pass only.
        dtype = torch.promote_types(values_R.dtype, weights_R.dtype)
        in_order_A = weights_R.to(dtype).index_select(0, plan.places_A)
        return _bags(values_R.to(dtype), plan.places_A, plan.starts_T, in_order_A)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        plan, (values_R, weights_R) = ctx.plan, ctx.saved_tensors
        if weights_R is None:
            return plan.take(grad_T), None, None
        wide_R, dtype = values_R.to(grad_T.dtype), values_R.dtype
        if torch.is_grad_enabled():  # somebody differentiates twice: operations that can be
            grad_R = plan.take(grad_T)
            weights = weights_R.view(-1, *(1,) * (grad_R.dim() - 1))
            return (grad_R * weights).to(dtype), _as_matrix(grad_R * wide_R).sum(1).to(weights_R.dtype), None
        rows_R, each_R = plan.sorted_row_ids_A, torch.arange(len(values_R), device=values_R.device)
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
    """

    local_experts: Callable[[int], range] = range
    dispatcher: Callable[[int], Dispatcher] = LocalDispatcher
