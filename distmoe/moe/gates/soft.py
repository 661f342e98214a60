"""Soft MoE: experts work on slots, each a weighted average of all tokens of a group; nothing is chosen or dropped."""

import torch
from torch import Tensor, nn

from distmoe.contracts import Context
from distmoe.moe.gates.base import Gate
from distmoe.moe.groups import Group, RoutingGroups, SharedRows, check_group
from distmoe.moe.routing import Routing, SlotMixing
from distmoe.moe.sums import Reducer


class SoftGate(Gate):
    """Two softmaxes of the same logits (T, S): over the tokens of a group into slots, over the slots back into tokens.

    ``slot_s = sum_t softmax_t(logits)_ts x_t``; ``y_t = sum_s softmax_s(logits)_ts expert(s)(slot_s)``. Slots
    ``e * P`` to ``(e + 1) * P - 1`` of a group belong to expert e. For measures, a token's probability of an expert is
    its weight on that expert's slots.

    Args:
        network: Maps tokens to logits (T, E * P); in the paper, cosines (a ``cosine`` network).
        num_experts: E.
        slots_per_expert: P.
        group: Tokens that share slots. ``image`` (the positions of one sample's feature map or patches) is the form
            of the paper and keeps samples apart; with N images or ``batch``, a sample's output depends on the others. A
            sample that is one token fills every slot with itself, which makes the layer a dense mixture over slots.

    Raises:
        ValueError: Fewer slots than 1; a group that is none.

    Source: Puigcerver et al. 2023 (arXiv:2308.00951) section 2.1. Differs: the logits are those of any network, the
    paper's are cosines times a learned scale (section 2.3); the last routing group may be smaller.
    """

    def __init__(self, network: nn.Module, num_experts: int, slots_per_expert: int = 1, group: Group = "image") -> None:
        super().__init__(network, num_experts)
        if slots_per_expert < 1:
            raise ValueError(f"slots_per_expert ({slots_per_expert}) must be at least 1")
        check_group(group)
        self.slots_per_expert = slots_per_expert
        self.group: Group = group

    @property
    def num_outputs(self) -> int:
        """E * P."""
        return self.num_experts * self.slots_per_expert

    def route(self, x_T: Tensor, context: Context) -> Routing:
        """(T, ...) tokens to G * S slots, one assignment each.

        Of slots that several ranks share, each rank has some, see :class:`distmoe.moe.routing.SlotMixing`.
        """
        logits_TS = self.logits(x_T)
        out_of_TS = logits_TS.softmax(dim=-1)
        rows = SharedRows.of(len(x_T), context, self.group, self.reducer, x_T.device)
        if rows.across_ranks:
            groups = RoutingGroups.of(len(x_T), context, self.group)
            shape = (rows.groups.num_groups, len(x_T))
            into_TS = softmax_over_ranks(logits_TS, self.reducer)
            mixing = SlotMixing(groups, into_TS.unflatten(0, shape), out_of_TS.unflatten(0, shape), self.reducer)
        else:
            # A filled-up place has no part in any slot.
            into_GNS = rows.groups.fold(logits_TS, fill=-torch.inf).softmax(dim=1)
            mixing = SlotMixing(rows.groups, into_GNS, rows.groups.fold(out_of_TS))
        slot_ids_A = torch.arange(mixing.own_slots.start, mixing.own_slots.stop, device=x_T.device)
        by_expert_TEP = logits_TS.unflatten(1, (self.num_experts, self.slots_per_expert))
        return Routing(
            num_rows=len(slot_ids_A),
            num_experts=self.num_experts,
            row_ids_A=slot_ids_A - mixing.own_slots.start,
            expert_ids_A=slot_ids_A % self.num_outputs // self.slots_per_expert,
            weights_A=torch.ones_like(slot_ids_A, dtype=logits_TS.dtype),
            logits_TE=by_expert_TEP.logsumexp(dim=-1),
            probs_TE=out_of_TS.unflatten(1, (self.num_experts, self.slots_per_expert)).sum(dim=-1),
            rows_per_sample=context.rows_per_sample,
            tokens_T=self.kept_tokens(x_T, context),
            mixing=mixing,
        )


def softmax_over_ranks(logits_TS: Tensor, reducer: Reducer) -> Tensor:
    """(T, S) this rank's part of the softmax over the tokens of all ranks. Collective; T may be 0 here."""
    lowest_1S = logits_TS.new_full((1, logits_TS.shape[1]), torch.finfo(logits_TS.dtype).min)
    largest_1S = torch.cat([logits_TS.detach(), lowest_1S]).amax(dim=0, keepdim=True)
    exponentials_TS = (logits_TS - reducer.gather(largest_1S).amax(dim=0)).exp()
    return exponentials_TS / reducer({"total_S": exponentials_TS.sum(dim=0)})["total_S"]
