"""Expert choice: every expert takes the tokens it scores highest, so the load is even by construction."""

import torch
from torch import Tensor, nn

from distmoe.contracts import Context
from distmoe.moe.gates.base import Gate
from distmoe.moe.gates.token_choice import largest
from distmoe.moe.groups import Group, SharedRows, check_group, expert_capacity
from distmoe.moe.routing import Routing


class ExpertChoiceGate(Gate):
    """In each routing group of n tokens every expert takes the ``ceil(capacity_factor * n / E)`` it scores highest.

    Scores are the softmax over experts, and the weights. A token may get several experts, or none and zeros for an
    output. Ties go to the earlier token.

    Args:
        network: Maps tokens to logits (T, E).
        num_experts: E.
        capacity_factor: Experts a token gets on average.
        group: Tokens among which an expert chooses. With ``batch``, what a token gets depends on the other images of
            its batch.

    Raises:
        ValueError: The capacity factor is not in (0, E]; a group that is none.

    Source: Zhou et al. 2022 (arXiv:2202.09368) section 3.2. Differs: the capacity is rounded up, so that an expert
    has work in a small group too; no limit on the experts of a token (their section 3.3).
    """

    def __init__(
        self, network: nn.Module, num_experts: int, capacity_factor: float = 2.0, group: Group = "image"
    ) -> None:
        super().__init__(network, num_experts)
        if not 0 < capacity_factor <= num_experts:
            raise ValueError(
                f"capacity_factor ({capacity_factor}) must be above 0 and at most the number of experts ({num_experts})"
            )
        check_group(group)
        self.capacity_factor = capacity_factor
        self.group: Group = group

    @property
    def experts_per_row(self) -> float:
        """On average."""
        return self.capacity_factor

    def route(self, x_T: Tensor, context: Context) -> Routing:
        """(T, ...) tokens to the assignments of group 0, expert by expert and best token first, then of group 1, ...

        Of a group over several ranks, each rank has the assignments of its own tokens.
        """
        logits_TE = self.logits(x_T)
        probs_TE = logits_TE.softmax(dim=-1)
        rows = SharedRows.of(len(x_T), context, self.group, self.reducer, x_T.device)
        row_ids_A, expert_ids_A = self._choices(rows.gather(probs_TE.detach()), rows)
        return Routing(
            num_rows=len(x_T),
            num_experts=self.num_experts,
            row_ids_A=row_ids_A,
            expert_ids_A=expert_ids_A,
            weights_A=probs_TE.flatten().index_select(0, row_ids_A * self.num_experts + expert_ids_A),
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            rows_per_sample=context.rows_per_sample,
            tokens_T=self.kept_tokens(x_T, context),
        )

    def _choices(self, probs: Tensor, rows: SharedRows) -> tuple[Tensor, Tensor]:
        """(A,) row and (A,) expert ids of this rank's assignments, from the probabilities of all ``rows``."""
        device, groups = probs.device, rows.groups
        # A filled-up place ranks below every token, whose probability is at least 0.
        scores_GEN = groups.fold(probs, fill=-1.0).transpose(1, 2)
        most = expert_capacity(self.capacity_factor, 1, groups.group_rows, self.num_experts)
        ranked_GEK = largest(scores_GEN.flatten(0, 1), most).view(groups.num_groups, self.num_experts, most)
        capacities_G = groups.capacities(self.capacity_factor, 1, self.num_experts, device)
        starts_G11 = (torch.arange(groups.num_groups, device=device) * groups.group_rows).view(-1, 1, 1)
        rows_GEK = ranked_GEK + starts_G11 - rows.own.start
        taken_GEK = torch.arange(most, device=device) < capacities_G.view(-1, 1, 1)
        taken_GEK = taken_GEK & (rows_GEK >= 0) & (rows_GEK < len(rows.own))
        experts_1E1 = torch.arange(self.num_experts, device=device).view(1, -1, 1)
        return rows_GEK[taken_GEK], experts_1E1.expand(taken_GEK.shape)[taken_GEK]
