"""What ranks tell each other besides tensors: outcomes and small numbers.

Between two exchanges a rank may do something alone (write a file, read data) and fail alone. Everything that may fail
so goes through :class:`Control`, which lets all ranks know: they go on together, or stop together with one message.
It may also take long, longer than any exchange: the others wait for it while the rank gives signs of life.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from distmoe.contracts import UserError
from distmoe.parallel.collectives import unobserved
from distmoe.parallel.heartbeat import Heartbeat

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class Control:
    """Talks over a process group of the CPU; without one, to nobody.

    Args:
        rank: This one.
        world_size: Number of ranks.
        group: A gloo group of all ranks; None: the default group, or none where there is one rank.
        heartbeat: The signs of life by which ranks wait for each other; None: all are as long in an exchange.
    """

    def __init__(
        self, rank: int = 0, world_size: int = 1, group: Any = None, heartbeat: Heartbeat | None = None
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._group = group
        self._heartbeat = heartbeat
        self._observe = unobserved if heartbeat is None else heartbeat.during

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that writes what is written once: rank 0."""
        return self.rank == 0

    def on_main(self, function: Callable[[], Result]) -> Result:
        """What ``function`` gives on rank 0, which alone runs it; small and picklable. Collective.

        Raises:
            UserError: It raised one, on rank 0; the same error on all ranks.
        """
        outcomes: list[Any] = [self._outcome(function if self.is_main else None)]
        if self.world_size > 1:
            self._wait_for_work()
            with self._observe("hearing from rank 0", 0):
                dist.broadcast_object_list(outcomes, src=0, group=self._group)
        return _results(outcomes)[0]

    def together(self, function: Callable[[], Result]) -> Result:
        """What ``function`` gives here, after it has run on all ranks. Collective.

        Raises:
            UserError: It raised one on some rank; the error of the first such rank on all.
        """
        outcome = self._outcome(function)
        self._wait_for_work()
        return _results(self._gathered(outcome))[self.rank]

    def gather(self, value: Result) -> list[Result]:
        """The values of all ranks, in their order; small and picklable. Collective."""
        return self._gathered(value)

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

    def _outcome(self, function: Callable[[], Any] | None) -> tuple[Any, UserError | None]:
        """What a function gives, or the error it raises."""
        if function is None:
            return None, None
        with nullcontext() if self._heartbeat is None else self._heartbeat.working_alone():
            try:
                return function(), None
            except UserError as error:
                if self.world_size == 1:
                    raise
                return None, error

    def _wait_for_work(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.wait_for_all(logger.info if self.is_main else logger.debug)

    def _gathered(self, value: Any) -> list[Any]:
        values = [value] * self.world_size
        if self.world_size > 1:
            with self._observe("agreeing with all ranks", 0):
                dist.all_gather_object(values, value, group=self._group)
        return values


def _results(outcomes: Sequence[tuple[Any, UserError | None]]) -> list[Any]:
    for _, raised in outcomes:
        if raised is not None:
            raise raised
    return [result for result, _ in outcomes]
