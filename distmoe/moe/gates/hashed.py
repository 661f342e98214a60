"""Hash gate: a fixed choice that looks at nothing but which token it is."""

from typing import Literal, get_args

import torch
from torch import Tensor

from distmoe import noise
from distmoe.contracts import Context
from distmoe.moe.choices import check_choice
from distmoe.moe.gates.base import token_counters
from distmoe.moe.gates.token_choice import Priority, Scores, TokenChoiceGate, largest
from distmoe.moe.groups import Group

HashedBy = Literal["token", "sample", "position"]


class HashGate(TokenChoiceGate):
    """k experts by a hash of the token's identity, each weighted 1 / k: a control that learns no gate.

    The same token gets the same experts in every epoch, with every seed, in training and evaluation, in every layout;
    another layer hashes to others. That needs a context, which knows the sample: without one (a layer inside somebody's
    own model) a sample is hashed by its place in the batch, so that it gets other experts in another batch.

    Args:
        num_experts: E.
        k: Experts a token.
        by: What is hashed: the sample and the position in it (``token``), the sample, or the position.
        capacity_factor: See :class:`TokenChoiceGate`, as the rest.
        group: As there.

    Raises:
        ValueError: k, the capacity factor or the group out of range; an unknown ``by``.

    Source: Roller et al. 2021 (arXiv:2106.04426) section 3. Differs: words have identities, image patches do not, so
    that the sample and the position take their place; k experts are averaged, not concatenated.
    """

    softmax_weights = False

    def __init__(
        self,
        num_experts: int,
        k: int = 1,
        by: HashedBy = "token",
        capacity_factor: float | None = None,
        group: Group = "image",
    ) -> None:
        priority: Priority = "position"
        super().__init__(None, num_experts, k, False, capacity_factor, group, priority)
        check_choice("by", by, get_args(HashedBy))
        self.by: HashedBy = by

    def scores(self, x_T: Tensor, context: Context) -> Scores:
        """Hashes to rank by, uniform in [0, 1); the probabilities are 1 / k at the chosen experts."""
        samples_T, positions_T = token_counters(context, x_T.device)
        counters = {
            "token": (samples_T[:, None], positions_T[:, None]),
            "sample": (samples_T[:, None],),
            "position": (positions_T[:, None],),
        }[self.by]
        experts = torch.arange(self.num_experts, device=x_T.device)
        ranking_TE = noise.uniform(noise.make_key("hash gate", context.path), *counters, experts)
        dtype = torch.promote_types(x_T.dtype, torch.float32)
        probs_TE = torch.zeros(ranking_TE.shape, dtype=dtype, device=x_T.device)
        probs_TE = probs_TE.scatter(1, largest(ranking_TE, self.k), 1.0 / self.k)
        return Scores(probs_TE, None, ranking_TE)
