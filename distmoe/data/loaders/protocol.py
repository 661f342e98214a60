"""What a loader is: it reads the samples a plan names and hands them over in batches, nothing more.

A loader holds one split. It does not shuffle, cut, augment or normalise: the order comes from
:mod:`distmoe.data.index_plan`, the rest happens on the device, the same for every loader. Two loaders given the same
plan deliver equal batches, bit for bit.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

from distmoe.contracts import Batch
from distmoe.data.index_plan import PlannedBatch


class Loader(Protocol):
    """Reads one split of a data set."""

    def batches(self, planned: Sequence[PlannedBatch]) -> Iterator[Batch]:
        """The batches of a plan, in its order, on the CPU, each in memory of its own.

        Padding is cut off: batch i holds the first ``planned[i].num_valid`` of its sample ids. Leaving the iterator
        early, or closing it, frees what it holds.

        Args:
            planned: All with equally many sample ids (the last ones are padding where ``num_valid`` is smaller).

        Raises:
            UserError: The data cannot be read any more (file damaged or gone).
            RuntimeError: The reading thread died or has been silent for too long; the message says which.
        """
        ...

    def close(self) -> None:
        """Frees threads and memory; safe to call twice."""
        ...
