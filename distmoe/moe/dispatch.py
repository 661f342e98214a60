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
    """The way back of :class:`LocalDispatcher`: integers only."""

    num_rows: int
    order_A: Tensor
    sorted_row_ids_A: Tensor


class LocalDispatcher:
    """All experts on this device.

    Only ``index_select`` and ``index_add`` are used: on two CPU threads the backward of ``x[ids]`` differs from run to
    run in the last bits.

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
        rows_per_expert_L = torch.bincount(
            expert_ids_A, minlength=self.num_experts
        ).cpu()  # sync: the experts split by it
        return x_T.index_select(0, sorted_row_ids_A), rows_per_expert_L, LocalPlan(num_rows, order_A, sorted_row_ids_A)

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
        weighted = outputs * weights_R.view(weights_R.shape + (1,) * (outputs.dim() - weights_R.dim()))
        return weighted.new_zeros((plan.num_rows, *outputs.shape[1:])).index_add(0, plan.sorted_row_ids_A, weighted)


@dataclass(frozen=True)
class Placement:
    """Which experts this rank holds and how tokens reach all of them; the default is one process.

    Attributes:
        local_experts: Number of experts -> the global ids of those on this rank.
        dispatcher: Number of experts -> the dispatcher that reaches all of them.
    """

    local_experts: Callable[[int], range] = range
    dispatcher: Callable[[int], Dispatcher] = LocalDispatcher
