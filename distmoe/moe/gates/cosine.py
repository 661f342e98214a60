"""Cosine gate: experts are directions, and a token's logits are its cosines with them over a learned temperature."""

import math

import torch
from torch import Tensor, nn

from distmoe.moe.gates.token_choice import Priority
from distmoe.moe.gates.topk import TopKGate
from distmoe.moe.groups import Group

MAX_SCALE = 100.0  # the temperature stays at 0.01 or above
_SHORTEST = 1e-6  # what is shorter has no direction


class CosineHead(nn.Module):
    """``logit_e = cos(x, w_e) / temperature``, bounded, so that no expert wins by the length of its weights.

    Parameters: ``directions`` (F, E) and ``log_scale`` (), the logarithm of 1 / temperature. A token of zeros has no
    direction: its logits are 0 and give it no gradient, which would be that of a division by its length.

    Args:
        features: F, width of the input.
        num_outputs: E.
        temperature: At the start.
    """

    def __init__(self, features: int, num_outputs: int, temperature: float = 0.3) -> None:
        super().__init__()
        self.temperature = temperature
        self.directions = nn.Parameter(torch.empty(features, num_outputs))
        self.log_scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random directions; the temperature as given."""
        nn.init.normal_(self.directions, std=0.01)
        self.log_scale.fill_(math.log(1.0 / self.temperature))

    def forward(self, x_TF: Tensor) -> Tensor:
        """(T, F) to (T, E), each entry at most 1 / temperature in size."""
        scale = self.log_scale.clamp(max=math.log(MAX_SCALE)).exp()
        return _unit(x_TF, dim=-1) @ _unit(self.directions, dim=0) * scale


def _unit(x: Tensor, dim: int) -> Tensor:
    lengths = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return torch.where(lengths > _SHORTEST, x / lengths.clamp(min=_SHORTEST), 0.0)


class CosineGate(TopKGate):
    """Top-k on the cosines between a projection of the token and one direction an expert.

    Args:
        network: Maps tokens to (T, ``projection``).
        num_experts: E.
        k: Experts a token.
        projection: Width in which cosines are taken (E / 2 in the paper).
        temperature: At the start; learned, and kept at 0.01 or above. The paper starts at 0.3 with a softmax and at
            0.07 with a sigmoid, Tutel at 0.5.
        renormalize: See :class:`TopKGate`, as the rest.
        capacity_factor: As there.
        group: As there.
        priority: As there.

    Raises:
        ValueError: As :class:`TopKGate`; a temperature below 0.01.

    Source: Chi et al. 2022 (arXiv:2204.09179) eq. 7-8, with the start and the clamp of Tutel's gate (directions of
    standard deviation 0.01, 1 / temperature at most 100). Differs: the paper keeps the length of the directions
    fixed, here it is free and matters only to how fast they turn; its balance loss takes a constant temperature, ours
    the learned one.
    """

    def __init__(
        self,
        network: nn.Module,
        num_experts: int,
        k: int = 2,
        projection: int = 64,
        temperature: float = 0.3,
        renormalize: bool = True,
        capacity_factor: float | None = None,
        group: Group = "image",
        priority: Priority = "position",
    ) -> None:
        super().__init__(network, num_experts, k, renormalize, capacity_factor, group, priority)
        if not temperature >= 1 / MAX_SCALE:
            raise ValueError(f"temperature ({temperature}) must be at least {1 / MAX_SCALE}")
        self.projection = projection
        self.head = CosineHead(projection, num_experts, temperature)

    @property
    def num_outputs(self) -> int:
        """The width of the projection."""
        return self.projection

    def logits(self, x_T: Tensor) -> Tensor:
        """(T, E) scaled cosines."""
        projected = super().logits(x_T)
        with torch.autocast(x_T.device.type, enabled=False):
            return self.head(projected)
