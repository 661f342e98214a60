"""What an engine is: it owns the optimizer and whatever happens to gradients between backward and update.

The training loop is the same code under every engine. The gradient rule: with N valid samples in the whole optimizer
step (over ranks and micro-batches), each rank back-propagates ``world_size * (sum of its sample losses) / N``, so that
the mean over ranks is the gradient of the global mean however the samples are split. Balance losses, which every rank
computes alike from reduced sums, count once: weighted by the micro-batch's share of N, without the factor world_size.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from distmoe.models.protocol import Model
from distmoe.moe.sums import Reducer

BuildOptimizer = Callable[[nn.Module], Optimizer]
BuildSchedule = Callable[[Optimizer, int], LRScheduler]


@dataclass(frozen=True)
class ParameterState:
    """All that training knows about one parameter, float32, whole, on the CPU.

    Attributes:
        weight: The parameter.
        moments: The optimizer's tensors by its own names (``exp_avg``, ``momentum_buffer``, ``step``, ...).
    """

    weight: Tensor
    moments: Mapping[str, Tensor] = field(default_factory=dict)


class Engine(Protocol):
    """One of: replicas (Accelerate), DeepSpeed."""

    world_size: int
    reducer: Reducer

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

    def parameter_states(self) -> dict[str, ParameterState]:
        """By canonical name: that of the one-process model."""
        ...

    def load_parameter_states(self, states: Mapping[str, ParameterState], steps_done: int) -> None:
        """Continues from saved states; names and shapes must be the model's."""
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
