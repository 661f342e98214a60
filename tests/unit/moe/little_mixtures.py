"""One little layer of each kind of mixture, in float64, and an input for it."""

import pytest
import torch

from distmoe.models.initial import initialize_parameters
from distmoe.moe.mixtures import Conv1dMoE, Conv2dMoE, Conv3dMoE, DenseMoE, MixtureLayer

CONVOLUTIONS = {1: Conv1dMoE, 2: Conv2dMoE, 3: Conv3dMoE}
GATES = ["full", "pooled", "position", "uniform"]
# float64 sums of at most a few hundred terms of size about 1, in another order.
EXACT = {"rtol": 1e-10, "atol": 1e-11}


def filled(layer: MixtureLayer, seed: int = 0) -> MixtureLayer:
    """The layer in float64, its values drawn from the seed, biases no longer zero."""
    layer = layer.double()
    initialize_parameters(layer, seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return layer


def dense(gate: str = "full", num_experts: int = 3, **arguments) -> MixtureLayer:
    arguments = {"expert_activation": "tanh", "gate_activation": "softmax", **arguments}
    return filled(DenseMoE(4, 5, num_experts, gate=gate, **arguments))


def conv(rank: int = 2, gate: str = "full", num_experts: int = 3, size=5, **arguments) -> MixtureLayer:
    arguments = {"padding": "same", "expert_activation": "tanh", "gate_activation": "softmax", **arguments}
    return filled(CONVOLUTIONS[rank](2, 4, num_experts, 3, size, gate=gate, **arguments))


LAYERS = {
    "dense": (dense, (4,)),
    "dense, uniform": (lambda **arguments: dense("uniform", **arguments), (4,)),
    **{
        f"{rank}d, {gate}": (lambda rank=rank, gate=gate, **arguments: conv(rank, gate, **arguments), (2, *(5,) * rank))
        for rank in (1, 2, 3)
        for gate in GATES
    },
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def layer_and_input(name: str, rows: int = 3, **arguments) -> tuple[MixtureLayer, torch.Tensor]:
    make, shape = LAYERS[name]
    layer = make(**arguments)
    return layer, torch.randn(rows, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
