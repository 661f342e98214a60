"""A split of a data set in memory, and how its samples are read as images."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Split:
    """All samples of a split, as stored.

    Attributes:
        inputs: Images: (N, H, W, C) with C 1 or 3, uint8 (float32 is possible in the user's own arrays). Anything
            else: (N, ...) uint8 or float32.
        labels: (N,) int64, from 0.
        factors: What was recorded with each sample, by name: (N, F) float32.
        class_names: One name a class, the same in both splits.
    """

    inputs: Array
    labels: Array
    factors: Mapping[str, Array] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()


def is_image_shape(sample_shape: tuple[int, ...]) -> bool:
    """Whether a stored sample of this shape is an image: (H, W, C) with one or three channels."""
    return len(sample_shape) == 3 and sample_shape[-1] in (1, 3)
