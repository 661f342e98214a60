"""Routing: the contract between gates, dispatchers, losses and metrics.

Letters used in ``moe/``: T tokens (rows) on this rank, D width, E experts in all, L experts on this rank, A
assignments, R rows received by this rank, C channels or classes. A *token* is whatever a gate routes (an image, a
patch, a position's feature vector); its shape is free.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Which token goes to which expert with what weight. It carries no loss: see :mod:`distmoe.moe.losses`.

    Attributes:
        num_rows: T.
        num_experts: E.
        row_ids_A: (A,) int64 token of each assignment.
        expert_ids_A: (A,) int64 expert of each assignment.
        weights_A: (A,) float32 combine weights, with gradient; (A, C) for gates with one weight a filter. May be
            negative for unnormalised gates; None until an attentive gate has weighed.
        logits_TE: (T, E) float32 gate logits, (T, C, E) for per-filter gates, or None.
        probs_TE: Softmax (or what the gate uses instead) of ``logits_TE``, same shape, or None.
        rows_per_sample: Tokens a sample has; rows come in sample order.
        wanted_E: (E,) int64 assignments each expert would have got without capacity; None where nothing is refused.
    """

    num_rows: int
    num_experts: int
    row_ids_A: Tensor
    expert_ids_A: Tensor
    weights_A: Tensor | None
    logits_TE: Tensor | None
    probs_TE: Tensor | None
    rows_per_sample: int = 1
    wanted_E: Tensor | None = None

    @property
    def assignments_per_row(self) -> int:
        """A / T for gates that give every row equally many assignments, row by row.

        Raises:
            ValueError: The assignments are not laid out like that.
        """
        per_row, rest = divmod(len(self.row_ids_A), max(self.num_rows, 1))
        if rest:
            raise ValueError(f"{len(self.row_ids_A)} assignments are not equally many for each of {self.num_rows} rows")
        return per_row

    @property
    def flat_logits(self) -> Tensor | None:
        """(T, E), or (T * C, E) for per-filter gates: one row for each distribution over experts."""
        return None if self.logits_TE is None else self.logits_TE.flatten(0, -2)

    @property
    def flat_probs(self) -> Tensor | None:
        """As :attr:`flat_logits`, of the probabilities."""
        return None if self.probs_TE is None else self.probs_TE.flatten(0, -2)

    @property
    def num_dropped(self) -> int:
        """Assignments that the gate wanted and capacity refused."""
        return 0 if self.wanted_E is None else int(self.wanted_E.sum()) - len(self.row_ids_A)

    def demand_per_expert(self) -> Tensor:
        """(E,) int64: how many assignments each expert would have got without capacity."""
        return self.rows_per_expert() if self.wanted_E is None else self.wanted_E

    def rows_per_expert(self) -> Tensor:
        """(E,) int64: how many assignments each expert got on this rank."""
        return torch.bincount(self.expert_ids_A, minlength=self.num_experts)

    def detach(self) -> "Routing":
        """The same routing without gradients, for metrics."""
        return replace(
            self,
            weights_A=None if self.weights_A is None else self.weights_A.detach(),
            logits_TE=None if self.logits_TE is None else self.logits_TE.detach(),
            probs_TE=None if self.probs_TE is None else self.probs_TE.detach(),
        )


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision and integers as float32; float64, which exact comparisons are made in, stays as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
