"""Dense gates: every expert sees every token."""

import torch
from torch import Tensor, nn

from distmoe.contracts import Context
from distmoe.moe.balance import RunningTotals
from distmoe.moe.gates.base import Gate, every_expert
from distmoe.moe.gates.token_choice import Scores, TokenChoiceGate
from distmoe.moe.routing import Routing


class DenseGate(TokenChoiceGate):
    """``g_e(x) = softmax_e(logits(x))``, all experts assigned to all tokens, row by row.

    Args:
        network: Maps tokens to logits (T, E).
        num_experts: E.
        k: In evaluation, only the k most probable experts, renormalised: fewer experts of a model trained softly.
            None: all.
        margin: Eigen's constraint on running totals, see :class:`distmoe.moe.balance.RunningTotals`; None: none.
        constraint_steps: Optimizer steps after which the constraint is lifted; None: never in training.

    Raises:
        ValueError: k out of range, or set in training; a negative margin; steps without a margin.

    Source: Jacobs, Jordan, Nowlan and Hinton 1991, "Adaptive Mixtures of Local Experts"; constraint: Eigen et al. 2013.
    """

    def __init__(
        self,
        network: nn.Module,
        num_experts: int,
        k: int | None = None,
        margin: float | None = None,
        constraint_steps: int | None = None,
    ) -> None:
        super().__init__(network, num_experts, num_experts if k is None else k)
        self.chooses = k is not None
        if margin is None and constraint_steps is not None:
            raise ValueError("constraint_steps needs a margin")
        if margin is not None:
            if not margin >= 0:
                raise ValueError(f"margin ({margin}) must be at least 0")
            self.balancer = RunningTotals(num_experts, margin, constraint_steps)

    def scores(self, x_T: Tensor, context: Context) -> Scores:
        """Softmax over the experts that the constraint leaves."""
        logits_TE = self.logits(x_T)
        if isinstance(self.balancer, RunningTotals):
            excluded_E = self.balancer.excluded(context)
            if excluded_E is not None:
                logits_TE = logits_TE.masked_fill(excluded_E, -torch.inf)
        probs_TE = logits_TE.softmax(dim=-1)
        return Scores(probs_TE, logits_TE, ranking_TE=logits_TE)

    def route(self, x_T: Tensor, context: Context) -> Routing:
        """(T, ...) tokens to T x E assignments, row by row in the order of the experts; to T x k where k is set."""
        if self.chooses:
            if context.training:
                raise ValueError("a dense gate trains all its experts: k is for evaluation; to train with k, use topk")
            return super().route(x_T, context)
        scores = self.scores(x_T, context)
        row_ids_A, expert_ids_A = every_expert(len(x_T), self.num_experts, x_T.device)
        return Routing(
            num_rows=len(x_T),
            num_experts=self.num_experts,
            row_ids_A=row_ids_A,
            expert_ids_A=expert_ids_A,
            weights_A=scores.probs_TE.flatten(),
            logits_TE=scores.logits_TE,
            probs_TE=scores.probs_TE,
            rows_per_sample=context.rows_per_sample,
            softmax_weights=True,
            tokens_T=self.kept_tokens(x_T, context),
        )


class UniformGate(Gate):
    """``g_e(x) = 1 / E`` for every token: the plain average of all experts, a control that learns no gate."""

    def __init__(self, num_experts: int) -> None:
        super().__init__(None, num_experts)

    def route(self, x_T: Tensor, context: Context) -> Routing:
        """(T, ...) tokens to T x E assignments, row by row in the order of the experts."""
        row_ids_A, expert_ids_A = every_expert(len(x_T), self.num_experts, x_T.device)
        dtype = torch.promote_types(x_T.dtype, torch.float32)
        probs_TE = torch.full((len(x_T), self.num_experts), 1.0 / self.num_experts, dtype=dtype, device=x_T.device)
        return Routing(
            num_rows=len(x_T),
            num_experts=self.num_experts,
            row_ids_A=row_ids_A,
            expert_ids_A=expert_ids_A,
            weights_A=probs_TE.flatten(),
            logits_TE=None,
            probs_TE=probs_TE,
            rows_per_sample=context.rows_per_sample,
            tokens_T=self.kept_tokens(x_T, context),
        )
