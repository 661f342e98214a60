"""Routing: the contract between gates, dispatchers, losses and metrics.

Letters used in ``moe/``: T tokens (rows) on this rank, D width, E experts in all, L experts on this rank, A
assignments, R rows received by this rank, C channels or classes, G routing groups, N tokens of a group, S slots. A
*token* is whatever a gate routes (an image, a patch, a position's feature vector); its shape is free.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distmoe.moe.groups import RoutingGroups
from distmoe.moe.sums import Reducer, no_reduction


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision and integers as float32; float64, which exact comparisons are made in, stays as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class SlotMixing:
    """The two matrices of Soft MoE, applied on the tokens' own rank: a dispatcher sees slots only.

    One group may hold the tokens of several ranks. Its slots are then added up over them, each slot is worked on by one
    rank, and every rank gets all outputs back.

    Attributes:
        groups: How T tokens fall into G groups of N.
        into_GNS: (G, N, S) weight of each token in each slot; sums to 1 over the tokens of a group.
        out_of_GNS: (G, N, S) weight of each slot's output in each token; sums to 1 over the slots.
        reducer: Over the ranks that share the slots. If there are several, G is 1, or 0 if none of them has a token,
            and N is this rank's T.
    """

    groups: RoutingGroups
    into_GNS: Tensor
    out_of_GNS: Tensor
    reducer: Reducer = no_reduction

    @property
    def own_slots(self) -> range:
        """Those of the G * S slots that this rank dispatches: an even share of consecutive ones, maybe none."""
        slots, rank, num_ranks = len(self.out_of_GNS) * self.out_of_GNS.shape[2], self.reducer.rank, self.num_ranks
        return range(slots * rank // num_ranks, slots * (rank + 1) // num_ranks)

    @property
    def num_ranks(self) -> int:
        """That share the slots."""
        return self.reducer.world_size

    def to_slots(self, x_T: Tensor) -> Tensor:
        """(T, ...) tokens to the slots that this rank dispatches, (:attr:`own_slots`, ...).

        They are averaged in float32 or wider, in the tokens' dtype. Collective if several ranks share the slots.
        """
        x_TD = at_least_float32(x_T).reshape(len(x_T), x_T.shape[1:].numel())
        x_GND = self.groups.fold(x_TD) if self.num_ranks == 1 else x_TD.unflatten(0, self.into_GNS.shape[:2])
        with torch.autocast(x_T.device.type, enabled=False):
            slots = torch.einsum("gns,gnd->gsd", self.into_GNS, x_GND).flatten(0, 1)
        if self.num_ranks > 1:
            slots = self.reducer({"slots": slots})["slots"][self.own_slots.start : self.own_slots.stop]
        return slots.reshape(len(slots), *x_T.shape[1:]).to(x_T.dtype)

    def from_slots(self, y: Tensor) -> Tensor:
        """Outputs of the slots that this rank dispatched to (T, ...), float32 or wider. Collective as above."""
        num_groups, _, num_slots = self.out_of_GNS.shape
        y = self.reducer.gather(at_least_float32(y))
        y_GSD = y.reshape(num_groups, num_slots, y.shape[1:].numel())
        with torch.autocast(y.device.type, enabled=False):
            tokens = self.groups.unfold(torch.einsum("gns,gsd->gnd", self.out_of_GNS, y_GSD))
        return tokens.reshape(len(tokens), *y.shape[1:])

    def detach(self) -> "SlotMixing":
        """The same matrices without gradient."""
        return replace(self, into_GNS=self.into_GNS.detach(), out_of_GNS=self.out_of_GNS.detach())


@dataclass(frozen=True)
class Routing:
    """Which row goes to which expert with what weight. It carries no loss: see :mod:`distmoe.moe.losses`.

    Rows are the tokens; for Soft MoE they are the slots, while logits and probabilities stay those of the tokens.

    Attributes:
        num_rows: Rows that assignments count: T, or this rank's slots where there is a ``mixing``.
        num_experts: E.
        row_ids_A: (A,) int64 row of each assignment.
        expert_ids_A: (A,) int64 expert of each assignment.
        weights_A: (A,) float32 combine weights, with gradient; (A, C) for gates with one weight a filter, (A, 1, ...)
            with one a position. May be negative for unnormalised gates; None until an attentive gate has weighed.
        logits_TE: (T, E) float32 gate logits, (T, C, E) for per-filter gates, or None.
        probs_TE: Softmax (or what the gate uses instead) of ``logits_TE``, same shape, or None.
        rows_per_sample: Tokens a sample has; rows come in sample order.
        wanted_E: (E,) int64 assignments each expert would have got without capacity; None where nothing is refused.
        softmax_weights: Whether a row's weights are the softmax of its assignments' logits: the logarithm of a weight
            is then known exactly, however small the weight.
        load_TE: (T, E) smooth estimate of the chance that a token chooses an expert (noisy gates), or None.
        tokens_T: (T, ...) what the gate saw, without gradient, for losses that compare tokens; None outside training
            and once detached.
        queries_T: (T, h) what an attentive gate asks the experts, until it has weighed.
        mixing: Soft MoE's way from tokens into slots and back, or None.
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
    softmax_weights: bool = False
    load_TE: Tensor | None = None
    tokens_T: Tensor | None = None
    queries_T: Tensor | None = None
    mixing: SlotMixing | None = None

    @property
    def assignments_per_row(self) -> int:
        """A / num_rows for gates that give every row equally many assignments, row by row; 0 without rows.

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
        """The same routing without gradients and without the tokens, for metrics."""
        return replace(
            self,
            weights_A=None if self.weights_A is None else self.weights_A.detach(),
            logits_TE=None if self.logits_TE is None else self.logits_TE.detach(),
            probs_TE=None if self.probs_TE is None else self.probs_TE.detach(),
            load_TE=None if self.load_TE is None else self.load_TE.detach(),
            tokens_T=None,
            queries_T=None,
            mixing=None if self.mixing is None else self.mixing.detach(),
        )
