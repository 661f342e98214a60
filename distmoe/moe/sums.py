"""Sums over tokens, which add over micro-batches and ranks: what losses, measures and balancers start from."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

Sums = dict[str, Tensor]


class Reducer(Protocol):
    """Adds or gathers tensors over all ranks; the gradient of the result reaches every rank's own share.

    Attributes:
        rank: Of this process.
        world_size: Number of ranks.
    """

    rank: int
    world_size: int

    def __call__(self, sums: Sums) -> Sums:
        """The sums over all ranks, in their dtype. Collective: every rank calls it, in the same order."""
        ...

    def gather(self, rows_T: Tensor) -> Tensor:
        """The rows of all ranks, (sum of T, ...), in rank order. Collective; ranks may have unequal numbers of rows."""
        ...


class NoReduction:
    """The :class:`Reducer` of one process: what it is given."""

    rank = 0
    world_size = 1

    def __call__(self, sums: Sums) -> Sums:
        """The sums themselves."""
        return sums

    def gather(self, rows_T: Tensor) -> Tensor:
        """The rows themselves."""
        return rows_T


no_reduction = NoReduction()


def add_sums(totals: Sums, more: Sums) -> None:
    """Adds ``more`` to ``totals`` in place, name by name."""
    for name, value in more.items():
        totals[name] = totals[name] + value if name in totals else value


def reduce_together(reducer: Reducer, groups: Mapping[str, Sums]) -> dict[str, Sums]:
    """Sums of several layers, or of whatever has a name, over all ranks. Collective: ``reducer`` is called once."""
    reduced = reducer({f"{group}\n{name}": value for group, sums in groups.items() for name, value in sums.items()})
    return {group: {name: reduced[f"{group}\n{name}"] for name in sums} for group, sums in groups.items()}
