"""From repeated measurements to a number that can be quoted: the median and its 95 % interval."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MIN_ROUNDS = 6  # fewer measurements have no 95 % interval: even from the smallest to the largest it is below


@dataclass(frozen=True)
class Estimate:
    """A median with the ends of its 95 % interval."""

    median: float
    low: float
    high: float


def estimate(values: Sequence[float]) -> Estimate:
    """The median and its 95 % interval by order statistics, which assumes nothing about the distribution.

    The interval goes from the k-th smallest to the k-th largest value, with the largest k such that the median lies
    outside with a probability of at most 5 %: twice the chance that fewer than k of n values are on one side of it.

    Raises:
        ValueError: Fewer than :data:`MIN_ROUNDS` values.
    """
    if len(values) < MIN_ROUNDS:
        raise ValueError(f"{len(values)} measurements, but a 95 % interval of a median needs {MIN_ROUNDS}")
    ordered, rank = sorted(values), 0
    outside = 2.0 ** (1 - len(values))  # twice the chance that none is on one side
    while outside <= 0.05:
        rank += 1
        outside += math.comb(len(values), rank) * 2.0 ** (1 - len(values))
    return Estimate(statistics.median(ordered), ordered[rank - 1], ordered[-rank])
