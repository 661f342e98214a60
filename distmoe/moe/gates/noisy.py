"""Noisy top-k: learned noise on the logits, and a smooth estimate of the load to balance by."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmoe import noise
from distmoe.contracts import Context
from distmoe.moe.gates.base import token_counters
from distmoe.moe.gates.token_choice import Priority, Scores, TokenChoiceGate
from distmoe.moe.groups import Group


class NoisyTopKGate(TokenChoiceGate):
    """``H_e(x) = logit_e(x) + N(0, 1) * sigma_e(x)``; the k largest of H, weighted by their softmax.

    In training the routing also holds ``load_TE``: the chance that a token chooses expert e if the noise on e alone
    were drawn again, ``Phi((logit_e - kth largest of the other H) / sigma_e)``, which has a gradient where the choice
    itself has none (:class:`distmoe.moe.losses.LoadLoss`). Evaluation has no noise.

    Args:
        network: Maps tokens to (T, 2 E): logits, then what ``sigma_e = softplus(.)`` is made of; with ``noise_std``,
            to logits (T, E) alone.
        num_experts: E.
        k: Experts a token.
        noise_std: A fixed sigma for all experts instead of a learned one (V-MoE: 1 / E).
        capacity_factor: See :class:`TokenChoiceGate`, as the rest.
        group: As there.
        priority: As there.

    Raises:
        ValueError: k or ``noise_std`` out of range; in training, k=1, whose weight would be the constant 1.

    Source: Shazeer et al. 2017 (arXiv:1701.06538) eq. 3-5 and appendix A, eq. 8-10. Differs: the probabilities that
    losses see are the softmax over all experts rather than over the k chosen, so that an expert nobody chooses is
    drawn back (as in V-MoE, whose importance is without noise, though); the softmax comes before the choice, which
    gives the same weights; 1e-6 is added to the learned sigma; the network need not start at zero.
    """

    noisy = True

    def __init__(
        self,
        network: nn.Module,
        num_experts: int,
        k: int = 2,
        noise_std: float | None = None,
        capacity_factor: float | None = None,
        group: Group = "image",
        priority: Priority = "position",
    ) -> None:
        super().__init__(network, num_experts, k, True, capacity_factor, group, priority)
        if noise_std is not None and not noise_std > 0:
            raise ValueError(f"noise_std ({noise_std}) must be above 0, or None to learn it")
        self.noise_std = noise_std

    @property
    def num_outputs(self) -> int:
        """2 E with learned noise, else E."""
        return self.num_experts * (2 if self.noise_std is None else 1)

    def scores(self, x_T: Tensor, context: Context) -> Scores:
        """Softmax of the noisy logits; of the clean ones in evaluation."""
        if context.training and self.k == 1:
            raise ValueError("k=1 gives the gate no gradient from the task, as its one weight is always 1: use k >= 2")
        outputs = self.logits(x_T)
        logits_TE = outputs[:, : self.num_experts]
        if not context.training:
            probs_TE = logits_TE.softmax(dim=-1)
            return Scores(probs_TE, logits_TE, ranking_TE=logits_TE)
        if self.noise_std is None:
            # softplus underflows to 0 far below zero, where the estimate would divide by it.
            sigma_TE = F.softplus(outputs[:, self.num_experts :]) + 1e-6
        else:
            sigma_TE = torch.full_like(logits_TE, self.noise_std)
        noisy_TE = logits_TE + self._draws(context, x_T.device).to(logits_TE) * sigma_TE
        probs_TE = noisy_TE.softmax(dim=-1)
        load_TE = chance_of_choice(logits_TE, noisy_TE, sigma_TE, self.k)
        return Scores(probs_TE, noisy_TE, ranking_TE=noisy_TE, load_TE=load_TE)

    def _draws(self, context: Context, device: torch.device) -> Tensor:
        samples_T, positions_T = token_counters(context, device)
        experts = torch.arange(self.num_experts, device=device)
        key = noise.make_key("gate noise", context.seed, context.step, context.path)
        return noise.normal(key, samples_T[:, None], positions_T[:, None], experts)


def chance_of_choice(logits_TE: Tensor, noisy_TE: Tensor, sigma_TE: Tensor, k: int) -> Tensor:
    """(T, E): ``Phi((logit_e - kth largest noisy logit of the others) / sigma_e)``; 1 where all are chosen (k = E)."""
    num_experts = logits_TE.shape[-1]
    if k == num_experts:
        return torch.ones_like(logits_TE)
    top_TK1 = noisy_TE.topk(k + 1, dim=-1).values
    kth_T1, next_T1 = top_TK1[:, k - 1 : k], top_TK1[:, k : k + 1]
    # Of the others: without an expert that is among the k largest, the k-th of the rest is the (k + 1)-th of all.
    threshold_TE = torch.where(noisy_TE >= kth_T1, next_T1, kth_T1)
    return torch.special.ndtr((logits_TE - threshold_TE) / sigma_TE)
