"""Values that pass between the parts of the system: batches, contexts, the description of a data set, user errors.

Everything here is plain data. The contracts that carry behaviour live beside their first implementation: gates and
dispatchers in ``moe/``, loaders in ``data/loaders/protocol.py``, engines in ``parallel/engines/protocol.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

SplitName = Literal["train", "test"]


class UserError(ValueError):
    """Something a user can cause and mend: a wrong setting, a damaged file, a full disk.

    The message names the place, the value, what is allowed and the fix. The command line prints it alone, without a
    traceback, and exits with code 2.
    """


@dataclass(frozen=True)
class DataSpec:
    """What a model has to know about a data set.

    Attributes:
        name: Name of the data set, as in ``data.name``.
        input_shape: Shape of one sample as the model sees it: (C, H, W) for images, anything else as stored.
        num_classes: Number of classes.
        class_names: One name a class.
        mean: Of the training set, per channel (images) or one value, in the units of the stored data (uint8: 0..255).
        std: Like ``mean``; never 0.
    """

    name: str
    input_shape: tuple[int, ...]
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Batch:
    """The samples one rank feeds its model in one micro-batch; padding is already cut off.

    Attributes:
        images: (B, C, H, W) uint8 for images, (B, ...) uint8 or float32 otherwise. B may be 0 on a rank.
        labels: (B,) int64.
        sample_ids: (B,) int64, the sample's position in its stored split; the key of all its noise.
        factors: Named tensors recorded with a sample, each (B,) or (B, F): translation, rotation, ...
    """

    images: Tensor
    labels: Tensor
    sample_ids: Tensor
    factors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_valid(self) -> int:
        """B, the number of samples that count."""
        return len(self.labels)


@dataclass(frozen=True)
class Context:
    """What the random numbers of one forward pass are keyed by (see ``distmoe.noise``).

    Attributes:
        seed: The run's random seed.
        step: Optimizer step, counted from 0.
        sample_ids: (B,) int64 of the samples in this forward pass.
        training: Whether noise, dropout and jitter apply.
        path: Name of the module that draws, so that no two of them draw alike.
        rows_per_sample: Tokens a sample has at this place of the network; rows come in sample order.
    """

    seed: int
    step: int
    sample_ids: Tensor
    training: bool
    path: str = ""
    rows_per_sample: int = 1

    def within(self, name: str) -> "Context":
        """The context of the submodule ``name``."""
        return replace(self, path=f"{self.path}.{name}" if self.path else name)
