"""The loader that keeps a whole split in memory and picks rows out of it. It needs no extra package."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distmoe.contracts import Batch
from distmoe.data.index_plan import PlannedBatch
from distmoe.data.split import Split, is_image_shape


def to_input(stored: Tensor) -> Tensor:
    """Samples as stored, to samples as a model takes them: images (B, H, W, C) become a (B, C, H, W) view."""
    return stored.permute(0, 3, 1, 2) if is_image_shape(tuple(stored.shape[1:])) else stored


class ResidentLoader:
    """A split as tensors on one device.

    Args:
        split: The samples.
        device: Where they are kept and batches are delivered.
    """

    def __init__(self, split: Split, device: torch.device | str = "cpu") -> None:
        self._inputs = torch.from_numpy(split.inputs).to(device)
        self._labels = torch.from_numpy(split.labels).to(device)
        self._factors = {name: torch.from_numpy(values).to(device) for name, values in split.factors.items()}

    def batches(self, planned: Sequence[PlannedBatch]) -> Iterator[Batch]:
        """See :class:`distmoe.data.loaders.protocol.Loader`; every batch is memory of its own."""
        for plan in planned:
            ids = plan.sample_ids[: plan.num_valid].to(self._labels.device)
            yield Batch(
                images=to_input(self._inputs.index_select(0, ids)),
                labels=self._labels.index_select(0, ids),
                sample_ids=ids,
                factors={name: values.index_select(0, ids) for name, values in self._factors.items()},
            )

    def close(self) -> None:
        """Nothing to free: the tensors go with the loader."""
