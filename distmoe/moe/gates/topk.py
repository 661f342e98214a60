"""Top-k and Switch: the logits of a network, their softmax, the most probable experts."""

import torch
from torch import Tensor, nn

from distmoe import noise
from distmoe.contracts import Context
from distmoe.moe.gates.base import token_counters
from distmoe.moe.gates.token_choice import Priority, Scores, TokenChoiceGate
from distmoe.moe.groups import Group


class TopKGate(TokenChoiceGate):
    """Softmax over all experts, then the k largest, weighted by their probability.

    Args:
        network: Maps tokens to logits (T, E).
        num_experts: E.
        k: Experts a token, 1..E.
        renormalize: Divide the k probabilities by their sum. Refused in training for k=1, whose weight would be the
            constant 1; in evaluation it gives fewer experts of a model trained with a larger k.
        capacity_factor: See :class:`TokenChoiceGate`, as the rest.
        group: As there.
        priority: As there.

    Raises:
        ValueError: k out of range; in training, k=1 renormalised.

    Source: Shazeer et al. 2017 (arXiv:1701.06538) eq. 3-5 without noise. Differs: softmax comes before the choice, as
    in Mixtral, and in Switch with k=1; renormalised, the weights are the same.
    """

    def scores(self, x_T: Tensor, context: Context) -> Scores:
        """Softmax of the logits."""
        if context.training and self.k == 1 and self.renormalize:
            raise ValueError("k=1 renormalised gives the gate no gradient from the task: use renormalize=False")
        logits_TE = self.logits(x_T)
        probs_TE = logits_TE.softmax(dim=-1)
        return Scores(probs_TE, logits_TE, ranking_TE=logits_TE)


class SwitchGate(TopKGate):
    """Top-1, weighted by its probability, with jitter on what the gate sees in training.

    Args:
        network: Maps tokens to logits (T, E).
        num_experts: E.
        jitter: In training each value of a token is multiplied by its own draw from [1 - jitter, 1 + jitter].
        capacity_factor: See :class:`TokenChoiceGate`, as the rest.
        group: As there.
        priority: As there.

    Source: Fedus et al. 2021 (arXiv:2101.03961) section 2.1, jitter: appendix C (1e-2 there).
    """

    noisy = True

    def __init__(
        self,
        network: nn.Module,
        num_experts: int,
        jitter: float = 0.01,
        capacity_factor: float | None = None,
        group: Group = "image",
        priority: Priority = "position",
    ) -> None:
        super().__init__(network, num_experts, 1, False, capacity_factor, group, priority)
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter ({jitter}) must be at least 0 and below 1")
        self.jitter = jitter

    def scores(self, x_T: Tensor, context: Context) -> Scores:
        """Softmax of the logits of jittered tokens."""
        if context.training and self.jitter > 0:
            x_T = x_T * self._factors(x_T, context)
        return super().scores(x_T, context)

    def _factors(self, x_T: Tensor, context: Context) -> Tensor:
        samples_T, positions_T = token_counters(context, x_T.device)
        values = torch.arange(x_T.shape[1:].numel(), device=x_T.device)
        key = noise.make_key("jitter", context.seed, context.step, context.path)
        draws = noise.uniform(key, samples_T[:, None], positions_T[:, None], values)
        return (1.0 + self.jitter * (2.0 * draws - 1.0)).reshape(x_T.shape)
