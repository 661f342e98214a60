"""Top-k token choice: every token goes to its k most probable experts, dropless or under capacity."""

import math
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor, nn

from distmoe.contracts import Context
from distmoe.moe.gates.base import Gate
from distmoe.moe.routing import Routing

Group = Literal["image", "batch"] | int


class TopKGate(Gate):
    """Softmax over all experts, then the k largest, weighted by their probability.

    Ties go to the lower expert id. Under capacity, an expert takes at most ``ceil(capacity_factor * k * n / E)`` rows
    of a routing group of n tokens: all first choices before all second choices, and inside a choice in row order
    (GShard's rule). What is over is dropped; the weights of what stays are not changed.

    Args:
        network: Maps tokens to logits (T, E).
        num_experts: E.
        k: Experts a token, 1..E.
        renormalize: Divide the k probabilities by their sum. Refused in training for k=1, whose weight would be the
            constant 1; in evaluation it gives fewer experts of a model trained with a larger k.
        capacity_factor: None is dropless.
        group: Tokens among which capacity acts: those of one image, of that many images, or of the micro-batch.

    Raises:
        ValueError: k out of range; in training, k=1 renormalised.

    Source: Shazeer et al. 2017 (arXiv:1701.06538) eq. 3-5 without noise; capacity: Lepikhin et al. 2020
    (arXiv:2006.16668) algorithm 1. Differs: softmax comes before the choice, as in Mixtral and Switch with k=1.
    """

    def __init__(
        self,
        network: nn.Module,
        num_experts: int,
        k: int = 2,
        renormalize: bool = True,
        capacity_factor: float | None = None,
        group: Group = "image",
    ) -> None:
        super().__init__(network, num_experts)
        if not 1 <= k <= num_experts:
            raise ValueError(f"k ({k}) must be between 1 and the number of experts ({num_experts})")
        self.k = k
        self.renormalize = renormalize
        self.capacity_factor = capacity_factor
        self.group: Group = group

    @property
    def experts_per_row(self) -> float:
        """The k of top-k."""
        return float(self.k)

    def route(self, x_T: Tensor, context: Context) -> Routing:
        """(T, ...) tokens to T x k assignments, row-major, fewer under capacity."""
        if context.training and self.k == 1 and self.renormalize:
            raise ValueError("k=1 renormalised gives the gate no gradient from the task: use renormalize=False")
        logits_TE = self.logits(x_T)
        probs_TE = logits_TE.softmax(dim=-1)
        # A stable sort, not topk: equal probabilities must go to the lower expert id on every device.
        expert_ids_TK = probs_TE.detach().sort(dim=-1, descending=True, stable=True).indices[:, : self.k]
        weights_TK = probs_TE.gather(1, expert_ids_TK)
        if self.renormalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        num_rows = len(logits_TE)
        row_ids_A = torch.arange(num_rows, device=x_T.device).repeat_interleave(self.k)
        expert_ids_A, weights_A = expert_ids_TK.flatten(), weights_TK.flatten()
        wanted_E = None
        if self.capacity_factor is not None:
            wanted_E = torch.bincount(expert_ids_A, minlength=self.num_experts)
            kept_A = self._within_capacity(expert_ids_TK, context)
            row_ids_A, expert_ids_A, weights_A = row_ids_A[kept_A], expert_ids_A[kept_A], weights_A[kept_A]
        return Routing(
            num_rows=num_rows,
            num_experts=self.num_experts,
            row_ids_A=row_ids_A,
            expert_ids_A=expert_ids_A,
            weights_A=weights_A,
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            rows_per_sample=context.rows_per_sample,
            wanted_E=wanted_E,
        )

    def _within_capacity(self, expert_ids_TK: Tensor, context: Context) -> Tensor:
        """(A,) bool, row-major: which assignments fit into their expert's capacity in their group."""
        num_rows = len(expert_ids_TK)
        if num_rows == 0:
            return torch.zeros(0, dtype=torch.bool, device=expert_ids_TK.device)
        if self.group == "batch":
            group_rows = num_rows
        else:
            group_rows = context.rows_per_sample * (1 if self.group == "image" else self.group)
        group_ids_T = torch.arange(num_rows, device=expert_ids_TK.device) // group_rows
        # Choice-major order inside a queue: transpose to (k, T), then a stable sort by (group, expert).
        queue_ids = (group_ids_T * self.num_experts + expert_ids_TK.T).flatten()
        order = queue_ids.argsort(stable=True)
        sorted_queues = queue_ids[order]
        starts = torch.searchsorted(sorted_queues, sorted_queues)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device) - starts
        capacity_T = torch.full_like(group_ids_T, self._capacity(group_rows))
        rest = num_rows % group_rows
        capacity_T[num_rows - rest :] = self._capacity(rest)
        return (places.view(self.k, num_rows) < capacity_T).T.flatten()

    def _capacity(self, group_rows: int) -> int:
        """Without rounding: in float32, 1/7 * 7 can come out above 1, and its ceiling is 2."""
        even_share = Fraction(str(self.capacity_factor)) * self.k * group_rows / self.num_experts
        return min(math.ceil(even_share), group_rows)  # an expert sees a token once
