"""What all gates share in which a token chooses its k experts: the choice, capacity, priority, weights."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from distmoe.contracts import Context
from distmoe.moe.choices import check_choice
from distmoe.moe.gates.base import Gate
from distmoe.moe.groups import Group, RoutingGroups, SharedRows, check_group
from distmoe.moe.routing import Routing

Priority = Literal["position", "score"]
_FEW = 8  # up to this k, picking the largest k times is faster than sorting all experts


@dataclass(frozen=True)
class Scores:
    """What a token-choice gate thinks of every expert.

    Attributes:
        probs_TE: (T, E) a distribution over experts for each token, for losses, measures and priority.
        logits_TE: (T, E) what the network said, noise included, or None.
        ranking_TE: (T, E) what the choice goes by; its gradient is not used. Logits rather than probabilities where
            both have one order: in a saturated softmax many a probability is 0.
        weights_TE: (T, E) what the weights are taken from; None: ``probs_TE``.
        load_TE: See :class:`distmoe.moe.routing.Routing`.
    """

    probs_TE: Tensor
    logits_TE: Tensor | None
    ranking_TE: Tensor
    weights_TE: Tensor | None = None
    load_TE: Tensor | None = None


class TokenChoiceGate(Gate):
    """Every token goes to the k experts that rank highest for it, dropless or under capacity.

    Ties go to the lower expert id. Under capacity, an expert takes at most ``ceil(capacity_factor * k * n / E)`` rows
    of a routing group of n tokens, and at most n: all first choices before all second choices, and inside a choice in
    the order of ``priority``. What is over is dropped; the weights of what stays are not changed.

    Args:
        network: Maps tokens to logits (T, E), or None.
        num_experts: E.
        k: Experts a token, 1..E.
        renormalize: Divide the k weights by their sum.
        capacity_factor: None is dropless.
        group: Tokens among which capacity acts: those of one image, of that many images, or of the micro-batch.
        priority: Who is served first inside a choice: ``position``, tokens as they come (GShard), or ``score``, the
            token with the most probable first choice (batch-prioritised routing of V-MoE); ties by position.

    Raises:
        ValueError: k, the capacity factor or the group out of range; an unknown priority.

    Source: capacity: Lepikhin et al. 2020 (arXiv:2006.16668) algorithm 1, for any k and without its random choice of
    the second expert; priority: Riquelme et al. 2021 (arXiv:2106.05974) section 4.1, inside a routing group instead of
    one device's batch.
    """

    softmax_weights = True  # whether renormalised weights are the softmax of the chosen logits

    def __init__(
        self,
        network: nn.Module | None,
        num_experts: int,
        k: int = 2,
        renormalize: bool = True,
        capacity_factor: float | None = None,
        group: Group = "image",
        priority: Priority = "position",
    ) -> None:
        super().__init__(network, num_experts)
        if not 1 <= k <= num_experts:
            raise ValueError(f"k ({k}) must be between 1 and the number of experts ({num_experts})")
        if capacity_factor is not None and not 0 < capacity_factor < math.inf:
            raise ValueError(
                f"capacity_factor ({capacity_factor}) must be above 0 and finite, or None for dropless routing"
            )
        check_group(group)
        check_choice("priority", priority, get_args(Priority))
        self.k = k
        self.renormalize = renormalize
        self.capacity_factor = capacity_factor
        self.group: Group = group
        self.priority: Priority = priority

    @abstractmethod
    def scores(self, x_T: Tensor, context: Context) -> Scores:
        """What the gate thinks of every expert, for tokens (T, ...)."""

    @property
    def experts_per_row(self) -> float:
        """The k of top-k."""
        return float(self.k)

    def route(self, x_T: Tensor, context: Context) -> Routing:
        """(T, ...) tokens to T x k assignments, row by row and best first, fewer under capacity."""
        scores = self.scores(x_T, context)
        expert_ids_TK = largest(scores.ranking_TE.detach(), self.k)
        weights_TE = scores.probs_TE if scores.weights_TE is None else scores.weights_TE
        weights_TK = weights_TE.gather(1, expert_ids_TK)
        if self.renormalize:
            tiny = torch.finfo(weights_TK.dtype).tiny
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=tiny)
        num_rows = len(weights_TE)
        row_ids_A = torch.arange(num_rows, device=x_T.device).repeat_interleave(self.k)
        expert_ids_A, weights_A = expert_ids_TK.flatten(), weights_TK.flatten()
        wanted_E = None
        if self.capacity_factor is not None:
            wanted_E = torch.bincount(expert_ids_A, minlength=self.num_experts)
            kept_A = self._within_capacity(expert_ids_TK, scores.probs_TE.detach(), context).nonzero().squeeze(1)
            row_ids_A, expert_ids_A = row_ids_A[kept_A], expert_ids_A[kept_A]
            weights_A = weights_A.index_select(0, kept_A)
        return Routing(
            num_rows=num_rows,
            num_experts=self.num_experts,
            row_ids_A=row_ids_A,
            expert_ids_A=expert_ids_A,
            weights_A=weights_A,
            logits_TE=scores.logits_TE,
            probs_TE=scores.probs_TE,
            rows_per_sample=context.rows_per_sample,
            wanted_E=wanted_E,
            softmax_weights=self.softmax_weights and self.renormalize and scores.logits_TE is not None,
            load_TE=scores.load_TE,
            tokens_T=self.kept_tokens(x_T, context),
        )

    def _within_capacity(self, expert_ids_TK: Tensor, probs_TE: Tensor, context: Context) -> Tensor:
        """(A,) bool, row by row: which assignments fit into their expert's capacity in their group."""
        assert self.capacity_factor is not None
        device = expert_ids_TK.device
        rows = SharedRows.of(len(expert_ids_TK), context, self.group, self.reducer, device)
        served = None
        if self.priority == "score":
            first_T = probs_TE.gather(1, expert_ids_TK[:, :1]).squeeze(1)
            served = rows.gather(first_T).argsort(descending=True, stable=True)
        capacities_G = rows.groups.capacities(self.capacity_factor, self.k, self.num_experts, device)
        kept = first_come(rows.gather(expert_ids_TK), rows.groups, capacities_G, self.num_experts, served)
        return rows.share(kept).flatten()


def largest(ranking_TE: Tensor, k: int) -> Tensor:
    """(T, k) different columns: the k largest entries of each row, largest first, the lower column first among equals.

    NaN counts as the largest. ``torch.topk`` leaves the order of equals open.
    """
    if k > _FEW:
        return ranking_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    # What has been picked is marked by -inf, so an entry of -inf must not be one.
    left_TE, picks = ranking_TE.clamp(min=torch.finfo(ranking_TE.dtype).min), []
    for _ in range(k):
        picks.append(left_TE.argmax(dim=-1, keepdim=True))  # the first of equals
        left_TE = left_TE.scatter(1, picks[-1], -torch.inf)
    return torch.cat(picks, dim=1)


def first_come(
    expert_ids_TK: Tensor, groups: RoutingGroups, capacities_G: Tensor, num_experts: int, served_T: Tensor | None
) -> Tensor:
    """(T, K) bool: which choices fit, all first choices of a group before all second choices.

    Args:
        expert_ids_TK: Choices of each token, best first.
        groups: Of the tokens.
        capacities_G: (G,) tokens that an expert takes from each group.
        num_experts: E.
        served_T: Tokens in the order in which they are served; None: as they come.
    """
    num_rows, k = expert_ids_TK.shape
    device = expert_ids_TK.device
    served_T = torch.arange(num_rows, device=device) if served_T is None else served_T
    group_ids_T = groups.ids(device)
    # Choice-major order inside a queue: transpose to (K, T), then a stable sort by (group, expert).
    queue_ids = (group_ids_T * num_experts + expert_ids_TK.T)[:, served_T].flatten()
    order = queue_ids.argsort(stable=True)
    sorted_queues = queue_ids[order]
    starts = torch.searchsorted(sorted_queues, sorted_queues)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=device) - starts
    places_KT = torch.empty(k, num_rows, dtype=torch.long, device=device)
    places_KT[:, served_T] = places.view(k, num_rows)
    return (places_KT < capacities_G[group_ids_T]).T
