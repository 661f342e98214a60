"""The family of gates: one file a family, one line each in ``GATES``."""

from collections.abc import Callable
from typing import Any

from torch import nn

from distmoe.config import AnyGate
from distmoe.moe.gates.attentive import AttentiveGate
from distmoe.moe.gates.base import Gate
from distmoe.moe.gates.cosine import CosineGate
from distmoe.moe.gates.dense import DenseGate, UniformGate
from distmoe.moe.gates.expert_choice import ExpertChoiceGate
from distmoe.moe.gates.hashed import HashGate
from distmoe.moe.gates.noisy import NoisyTopKGate
from distmoe.moe.gates.sigmoid import SigmoidGate
from distmoe.moe.gates.soft import SoftGate
from distmoe.moe.gates.topk import SwitchGate, TopKGate

GATES: dict[str, Callable[..., Gate]] = {
    "dense": DenseGate,
    "topk": TopKGate,
    "noisy_topk": NoisyTopKGate,
    "switch": SwitchGate,
    "cosine": CosineGate,
    "sigmoid": SigmoidGate,
    "expert_choice": ExpertChoiceGate,
    "soft": SoftGate,
    "attentive": AttentiveGate,
    "hash": HashGate,
    "uniform": UniformGate,
}


def build_gate(
    section: AnyGate, num_experts: int, make_network: Callable[[int], nn.Module], hidden: int | None = None
) -> Gate:
    """The gate that ``moe.gate`` describes; every field of the section but name and network is an argument of the gate.

    Args:
        section: Of the config.
        num_experts: E.
        make_network: Number of outputs -> a network from tokens to that many outputs, see
            :func:`distmoe.moe.networks.network_factory`.
        hidden: Width of the experts' hidden states, which an attentive gate needs.

    Raises:
        ValueError: The settings do not fit the token or the number of experts.
    """
    settings: dict[str, Any] = section.model_dump(exclude={"name", "network"})
    if section.name in ("hash", "uniform"):
        return GATES[section.name](num_experts, **settings)
    if section.name == "attentive":
        settings["hidden"] = hidden
    gate = GATES[section.name](None, num_experts, **settings)
    gate.network = make_network(gate.num_outputs)
    return gate
