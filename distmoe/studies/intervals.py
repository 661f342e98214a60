"""Mean and 95 % interval over random seeds."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# 97.5 % quantile of Student's t distribution for 1..30 degrees of freedom.
_T_QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
_T_MANY = 2.0423  # for more: that of 30, at most 4 % too wide


@dataclass(frozen=True)
class MeanInterval:
    """Mean of n values and half the width of its 95 % interval, None for a single value."""

    mean: float
    half_width: float | None
    count: int

    def format(self, pattern: str = "{:.4f}") -> str:
        """``mean +- half width (n)``, the mean alone for a single value."""
        mean = pattern.format(self.mean)
        return mean if self.half_width is None else f"{mean} +- {pattern.format(self.half_width)}"


def mean_interval(values: Sequence[float]) -> MeanInterval:
    """Student's t interval of the mean, ``t(0.975, n - 1) * s / sqrt(n)``.

    Raises:
        ValueError: No values.
    """
    count = len(values)
    if count == 0:
        raise ValueError("no values to take the mean of")
    if count == 1:
        return MeanInterval(values[0], None, 1)
    quantile = _T_QUANTILES[count - 2] if count - 2 < len(_T_QUANTILES) else _T_MANY
    half_width = quantile * statistics.stdev(values) / math.sqrt(count)
    return MeanInterval(statistics.fmean(values), half_width, count)
