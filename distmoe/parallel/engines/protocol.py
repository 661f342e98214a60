"""What an engine is: it owns the optimizer and whatever happens to gradients between backward and update.

The training loop is the same code under every engine. The gradient rule: with N valid samples in the whole optimizer
step (over ranks and micro-batches), each rank back-propagates ``world_size * (sum of its sample losses) / N``, so that
the mean over ranks is the gradient of the global mean however the samples are split. Balance losses, which every rank
computes alike from reduced sums, count once: weighted by the micro-batch's share of N, without the factor world_size.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from distmoe.models.protocol import Model
from distmoe.moe.dispatch import Placement
from distmoe.moe.sums import Reducer
from distmoe.parallel.collectives import Communicators
from distmoe.parallel.shards import Piece, TensorSource

BuildOptimizer = Callable[[nn.Module], Optimizer]
BuildSchedule = Callable[[Optimizer, int], LRScheduler]


class Engine(Protocol):
    """One of: replicas (Accelerate), DeepSpeed."""

    world_size: int
    communicators: Communicators
    reducer: Reducer
    placement: Placement

    def prepare(self, model: nn.Module, build_optimizer: BuildOptimizer, build_schedule: BuildSchedule) -> Model:
        """Takes the model over and returns what to call in its place.

        Args:
            model: With its initial weights, on the CPU.
            build_optimizer: Makes the optimizer of a model's parameters.
            build_schedule: Makes the learning rate schedule, given how many steps are done.
        """
        ...

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch; ``last`` of its optimizer step."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss scaled by the rule above. No division by the number of micro-batches."""
        ...

    def step(self) -> Tensor:
        """Clips by the true global norm, updates, advances the schedule, clears the gradients.

        Returns:
            The global gradient norm before clipping, a scalar; not finite where an fp16 step was skipped.
        """
        ...

    def learning_rate(self) -> float:
        """Of the next step."""
        ...

    def pieces(self) -> Iterator[Piece]:
        """The parts of weights and moments that this rank is to save: over all ranks, every element once."""
        ...

    def load(self, source: TensorSource, steps_done: int) -> None:
        """Continues from saved weights and moments, reading only what this rank holds; the model's names and shapes."""
        ...

    def adopt_weights(self) -> None:
        """Goes on from the weights that are in the model now, where somebody has changed them. Not of moments."""
        ...

    def scaler_state(self) -> dict[str, float]:
        """Loss scale and its counters (fp16), else empty."""
        ...

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        """Continues from :meth:`scaler_state`."""
        ...

    def close(self) -> None:
        """Frees what the engine holds; safe to call twice."""
        ...
