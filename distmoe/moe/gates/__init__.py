"""The family of gates: one file each, one line each in ``GATES``."""

from collections.abc import Callable
from typing import Any

from torch import nn

from distmoe.config import AnyGate
from distmoe.moe.gates.base import Gate
from distmoe.moe.gates.dense import DenseGate
from distmoe.moe.gates.topk import TopKGate

GATES: dict[str, Callable[..., Gate]] = {
    "dense": DenseGate,
    "topk": TopKGate,
}


def build_gate(section: AnyGate, network: nn.Module, num_experts: int) -> Gate:
    """The gate that ``moe.gate`` describes; every field of the section but its name is an argument of the gate."""
    settings: dict[str, Any] = section.model_dump(exclude={"name"})
    return GATES[section.name](network, num_experts, **settings)
