"""An exponential moving average of the weights, evaluated in their place."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from distmoe.parallel.mesh import Mesh
from distmoe.parallel.shards import AVERAGE, WEIGHT, Piece, TensorSource, load_extents, owned_pieces, parameter_extents


class WeightAverage:
    """``a <- decay * a + (1 - decay) * w`` after every optimizer step, started at the initial weights.

    Early on, when few steps are behind it, the decay is held down to ``(1 + n) / (10 + n)`` so that the initial
    weights are forgotten. Buffers (batch statistics, normalisation) are not averaged. Each rank averages the parameters
    it holds.

    Args:
        model: Its parameters are averaged.
        decay: A step's decay, in (0, 1).
        mesh: Tells who else holds them; by default nobody.
    """

    def __init__(self, model: nn.Module, decay: float, mesh: Mesh | None = None) -> None:
        self.decay = decay
        self._mesh = mesh or Mesh()
        self._weights = parameter_extents(model, self._mesh)
        self.restart()

    def restart(self) -> None:
        """Starts anew at the model's weights as they are."""
        self._averages = {
            name: replace(weight, tensor=weight.tensor.detach().clone()) for name, weight in self._weights.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = [average.tensor for average in self._averages.values()]
        weights = [weight.tensor for weight in self._weights.values()]
        torch._foreach_lerp_(averages, weights, 1.0 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model has the averaged weights inside this context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def pieces(self) -> Iterator[Piece]:
        """What this rank is to save of the averages, as they are until the next :meth:`update`."""
        return owned_pieces(AVERAGE, self._averages, self._mesh)

    def load(self, source: TensorSource) -> None:
        """Continues from saved averages, or from the saved weights where none were kept."""
        load_extents(source, AVERAGE if source.names(AVERAGE) else WEIGHT, self._averages)

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():
            kept = weight.tensor.detach().clone()
            weight.tensor.copy_(self._averages[name].tensor)
            self._averages[name].tensor.copy_(kept)
