"""Sigmoid gate of DeepSeek-V3, balanced by a bias instead of a loss."""

from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional as F

from distmoe.contracts import Context
from distmoe.moe.balance import LossFreeBias
from distmoe.moe.gates.token_choice import Priority, Scores, TokenChoiceGate
from distmoe.moe.groups import Group
from distmoe.moe.routing import Routing


class SigmoidGate(TokenChoiceGate):
    """``s_e = sigmoid(logit_e)``; the k largest of ``s_e + b_e`` are chosen, and weighted by s alone.

    The bias b follows the load (:class:`distmoe.moe.balance.LossFreeBias`). Losses and measures see ``s / sum s``.

    Args:
        network: Maps tokens to logits (T, E).
        num_experts: E.
        k: Experts a token.
        bias_rate: How far a step moves a bias; 0 switches the balancing off.
        renormalize: Divide the k weights by their sum; for k=1 in training refused, as its weight would be 1.
        scale: Factor on all weights.
        capacity_factor: See :class:`TokenChoiceGate`, as the rest.
        group: As there.
        priority: As there.

    Raises:
        ValueError: k or the rate out of range; in training, k=1 renormalised.

    Source: DeepSeek-AI 2024 (arXiv:2412.19437) eq. 12-16; bias: Wang et al. 2024 (arXiv:2408.15664). Differs: no
    limit on the nodes a token visits; capacity may drop.
    """

    softmax_weights = False

    def __init__(
        self,
        network: nn.Module,
        num_experts: int,
        k: int = 2,
        bias_rate: float = 1e-3,
        renormalize: bool = True,
        scale: float = 1.0,
        capacity_factor: float | None = None,
        group: Group = "image",
        priority: Priority = "position",
    ) -> None:
        super().__init__(network, num_experts, k, renormalize, capacity_factor, group, priority)
        if not bias_rate >= 0:
            raise ValueError(f"bias_rate ({bias_rate}) must be at least 0")
        self.scale = scale
        self.balancer = LossFreeBias(num_experts, bias_rate)

    def scores(self, x_T: Tensor, context: Context) -> Scores:
        """Sigmoid scores; the choice adds the bias."""
        if context.training and self.k == 1 and self.renormalize:
            raise ValueError("k=1 renormalised gives the gate no gradient from the task: use renormalize=False")
        logits_TE = self.logits(x_T)
        scores_TE = logits_TE.sigmoid()
        assert isinstance(self.balancer, LossFreeBias)
        ranking_TE = scores_TE.detach() + self.balancer.bias_E
        # Far below zero every sigmoid is 0 and a sum of them too; the softmax of their logarithms is not.
        probs_TE = F.logsigmoid(logits_TE).softmax(dim=-1)
        weights_TE = probs_TE if self.renormalize else scores_TE
        return Scores(probs_TE, logits_TE, ranking_TE, weights_TE)

    def route(self, x_T: Tensor, context: Context) -> Routing:
        """See :class:`TokenChoiceGate`; the weights of a row sum to ``scale`` where they are renormalised."""
        routing = super().route(x_T, context)
        assert routing.weights_A is not None
        return replace(routing, weights_A=routing.weights_A * self.scale) if self.scale != 1.0 else routing
