"""What ranks tell each other besides tensors: outcomes and small numbers.

Between two exchanges a rank may do something alone (write a file, read data) and fail alone. Everything that may fail
so goes through :class:`Control`, which lets all ranks know: they go on together, or stop together with one message.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from distmoe.contracts import UserError
from distmoe.parallel.collectives import Observe, unobserved

Result = TypeVar("Result")


class Control:
    """Talks over a process group of the CPU; without one, to nobody.

    Args:
        rank: This one.
        world_size: Number of ranks.
        group: A gloo group of all ranks; None: the default group, or none where there is one rank.
        observe: See :data:`distmoe.parallel.collectives.Observe`.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, group: Any = None, observe: Observe = unobserved) -> None:
        self.rank = rank
        self.world_size = world_size
        self._group = group
        self._observe = observe

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that writes what is written once: rank 0."""
        return self.rank == 0

    def on_main(self, function: Callable[[], Result]) -> Result:
        """What ``function`` gives on rank 0, which alone runs it; small and picklable. Collective.

        Raises:
            UserError: It raised one, on rank 0; the same error on all ranks.
        """
        return self._all(function if self.is_main else None)[0]

    def together(self, function: Callable[[], Result]) -> Result:
        """What ``function`` gives here, after it has run on all ranks. Collective.

        Raises:
            UserError: It raised one on some rank; the error of the first such rank on all.
        """
        return self._all(function)[self.rank]

    def gather(self, value: Result) -> list[Result]:
        """The values of all ranks, in their order; small and picklable. Collective."""
        return self._all(lambda: value)

    def largest(self, numbers: Sequence[float]) -> list[float]:
        """Each number's largest value over all ranks; NaN and infinity count as infinity. Collective."""
        values = torch.tensor(list(numbers), dtype=torch.float64).nan_to_num(torch.inf, torch.inf, -torch.inf)
        if self.world_size > 1:
            with self._observe("agreeing with all ranks", values.numel() * values.element_size()):
                dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group)
        return [float(value) for value in values]

    def equal(self, number: float) -> bool:
        """Whether all ranks have given the same number. Collective."""
        highest, lowest = self.largest([number, -number])
        return highest == -lowest

    def wait(self) -> None:
        """Returns when all ranks have come here. Collective."""
        self.largest([0.0])

    def _all(self, function: Callable[[], Any] | None) -> list[Any]:
        outcome: tuple[Any, UserError | None] = (None, None)
        try:
            outcome = (function() if function is not None else None, None)
        except UserError as error:
            if self.world_size == 1:
                raise
            outcome = (None, error)
        outcomes: list[Any] = [outcome] * self.world_size
        if self.world_size > 1:
            with self._observe("agreeing with all ranks", 0):
                dist.all_gather_object(outcomes, outcome, group=self._group)
        for _, raised in outcomes:
            if raised is not None:
                raise raised
        return [result for result, _ in outcomes]
