"""The moments of an optimizer that holds parameters as the model does, not in partitions."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from distmoe.parallel.mesh import Mesh
from distmoe.parallel.shards import MOMENT, Extent, Piece, TensorSource, owned_piece

STEP = "step"  # torch's name for an optimizer's count of steps, the one state that is not shaped as its parameter


def moment_kinds(source: TensorSource, name: str) -> list[str]:
    """Which moments there are of a parameter."""
    return [kind for kind in source.kinds() if kind.startswith(MOMENT) and name in source.names(kind)]


def whole_moments(optimizer: Optimizer, name: str, extent: Extent, mesh: Mesh) -> Iterator[Piece]:
    """What this rank writes of a parameter's moments."""
    for key, value in optimizer.state.get(extent.tensor, {}).items():
        if isinstance(value, Tensor):
            piece = owned_piece(MOMENT + key, name, extent, mesh, value)
            if piece is not None:
                yield piece


@torch.no_grad()
def load_whole_moments(optimizer: Optimizer, source: TensorSource, name: str, extent: Extent) -> None:
    """Reads a parameter's moments. Step counts stay on the CPU, as torch's optimizers keep them."""
    state = optimizer.state[extent.tensor]
    state.clear()
    for kind in moment_kinds(source, name):
        key = kind.removeprefix(MOMENT)
        if key == STEP:
            state[key] = source.read(kind, name, 0, 1).view(()).clone()
        else:
            values = source.read(kind, name, extent.start, extent.tensor.numel())
            state[key] = values.view(extent.tensor.shape).to(extent.tensor.device, copy=True)
