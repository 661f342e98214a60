"""Augmentation of whole batches on the device they are on, with random numbers keyed by (seed, epoch, sample).

What happens to a sample depends on the seed, the epoch and the sample's number alone: neither on the batch it is in nor
on the rank, so every layout trains on the same pixels. Mirroring, cropping and placing are one gather: they only say
from which row and column of the stored image each pixel comes.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distmoe.config import DataSection
from distmoe.contracts import Batch, DataSpec, UserError
from distmoe.data.datasets import DATASETS
from distmoe.noise import integers, make_key, random_bits

Flip = Literal["none", "random", "alternating"]


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images.

    Attributes:
        flip: Mirror left-right: ``random`` by a coin each epoch; ``alternating`` by a coin of the sample's own, and the
            other way in each following epoch, so that two epochs show both sides.
        crop_padding: Mirror this many pixels outwards at each edge, then cut a window of the original size at random.
        cutout: Side in pixels of a square around a random pixel that is painted with the mean colour; what sticks out
            of the image is lost.
    """

    flip: Flip = "none"
    crop_padding: int = 0
    cutout: int = 0


# What a data set gets where the configuration says null.
DEFAULTS: dict[str, Augmentation] = {
    "cifar10": Augmentation(flip="alternating", crop_padding=2),
    "cifar100": Augmentation(flip="alternating", crop_padding=2),
    "mnist": Augmentation(),
    "fashionmnist": Augmentation(flip="random"),
    "translated_mnist": Augmentation(),
    "synthetic": Augmentation(),
    "arrays": Augmentation(),
}


class Augmenter:
    """Augments the batches of one run.

    Args:
        data: The data section; a setting of null takes the data set's own default (:data:`DEFAULTS`).
        spec: Of the data set: the shape of the model's input and the mean colour.
        seed: The run's random seed.

    Raises:
        UserError: Augmentation is asked for on inputs that are not images, or is too large for them.
    """

    def __init__(self, data: DataSection, spec: DataSpec, seed: int) -> None:
        self.settings = _resolve(data, spec)
        self._seed = seed
        self._border = DATASETS[data.name].border
        # Painted into uint8 images, so in their units and rounded.
        self._mean = torch.tensor(spec.mean, dtype=torch.float32)

    def train(self, batch: Batch, epoch: int) -> Batch:
        """The batch as the model sees it in ``epoch`` (from 0): new images, other fields unchanged.

        Where the images are placed on a larger ground (translated_mnist) a factor ``translation`` is added: (B, 2)
        float32, pixels down and to the right of the centre.
        """
        settings, ids, images = self.settings, batch.sample_ids, batch.images
        if settings.flip != "none" or settings.crop_padding:
            rows, columns = self._window(images, ids, epoch)
            images = _gather(images, rows, columns)
        if self._border:
            offsets = self._offsets(make_key(self._seed, epoch, "augment.translation"), ids)
            batch, images = _with_translation(batch, offsets - self._border), _place(images, offsets, self._border)
        if settings.cutout:
            images = self._cut_out(images, ids, epoch)
        return dataclasses.replace(batch, images=images)

    def evaluate(self, batch: Batch) -> Batch:
        """The batch as the model sees it in evaluation: unchanged, or placed at an offset fixed by the sample alone.

        The offset does not depend on the run's seed: all runs are tested on the same images.
        """
        if not self._border:
            return batch
        offsets = self._offsets(make_key("augment.translation", "evaluation"), batch.sample_ids)
        placed = _place(batch.images, offsets, self._border)
        return dataclasses.replace(_with_translation(batch, offsets - self._border), images=placed)

    def _window(self, images: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """The row and the column each pixel comes from: (B, H) and (B, W) int64."""
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=ids.device).expand(len(ids), height)
        columns = torch.arange(width, device=ids.device).expand(len(ids), width)
        padding = self.settings.crop_padding
        if padding:
            starts = 2 * padding + 1
            window = integers(make_key(self._seed, epoch, "augment.crop"), starts * starts, ids)[:, None]
            rows = _mirror(rows + (window // starts - padding), height)
            columns = _mirror(columns + (window % starts - padding), width)
        if self.settings.flip != "none":
            mirrored = self._mirrored(ids, epoch)[:, None]
            columns = torch.where(mirrored, width - 1 - columns, columns)
        return rows, columns

    def _mirrored(self, ids: Tensor, epoch: int) -> Tensor:
        """Which samples are mirrored: (B,) bool."""
        if self.settings.flip == "alternating":
            own = random_bits(make_key(self._seed, "augment.flip"), ids) & 1
            return (own ^ (epoch & 1)).bool()
        return (random_bits(make_key(self._seed, epoch, "augment.flip"), ids) & 1).bool()

    def _offsets(self, key: int, ids: Tensor) -> Tensor:
        """Rows and columns of empty ground above and left of each image: (B, 2) int64, 0 to twice the border."""
        places = 2 * self._border + 1
        place = integers(key, places * places, ids)
        return torch.stack([place // places, place % places], dim=1)

    def _cut_out(self, images: Tensor, ids: Tensor, epoch: int) -> Tensor:
        height, width = images.shape[-2:]
        side = self.settings.cutout
        centre = integers(make_key(self._seed, epoch, "augment.cutout"), height * width, ids)
        rows = _within(centre // width - side // 2, side, height)
        columns = _within(centre % width - side // 2, side, width)
        mean = self._mean if images.is_floating_point() else self._mean.round()
        fill = mean.to(images.device, images.dtype)[None, :, None, None]
        return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], fill, images)


def _resolve(data: DataSection, spec: DataSpec) -> Augmentation:
    """The settings in force, checked against the images."""
    asked, default = data.augment, DEFAULTS[data.name]
    settings = Augmentation(
        flip=default.flip if asked.flip is None else asked.flip,
        crop_padding=default.crop_padding if asked.crop_padding is None else asked.crop_padding,
        cutout=default.cutout if asked.cutout is None else asked.cutout,
    )
    if settings == Augmentation():
        return settings
    if len(spec.input_shape) != 3 or spec.input_shape[0] != len(spec.mean):
        raise UserError(
            f"data.augment asks for {settings} on {spec.name}, whose samples {spec.input_shape} are not images: set "
            "flip: none, crop_padding: 0, cutout: 0, or store images as (samples, height, width, 1 or 3)"
        )
    border = DATASETS[data.name].border
    smallest = min(spec.input_shape[1:])
    if settings.crop_padding >= smallest - 2 * border:
        raise UserError(
            f"data.augment.crop_padding ({settings.crop_padding}): must be below {smallest - 2 * border}, the height "
            f"and width of {spec.name}'s images, since the padding mirrors them"
        )
    if settings.cutout > smallest:
        raise UserError(
            f"data.augment.cutout ({settings.cutout}): must be at most {smallest}, the height and width of the images"
        )
    return settings


def _mirror(position: Tensor, size: int) -> Tensor:
    """Positions before 0 or after ``size`` - 1 reflected at the edge pixel, which is not repeated."""
    position = position.abs()
    return torch.where(position >= size, 2 * (size - 1) - position, position)


def _gather(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """images[b, c, rows[b, y], columns[b, x]] for all b, c, y, x, in one pass."""
    batch, channels, height, width = images.shape
    index = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    picked = images.reshape(batch, channels, height * width).gather(2, index[:, None].expand(-1, channels, -1))
    return picked.reshape(batch, channels, rows.shape[1], columns.shape[1])


def _place(images: Tensor, offsets: Tensor, border: int) -> Tensor:
    """Each image on an empty ground larger by ``border`` on each side, its corner at (row, column) ``offsets``."""
    height, width = images.shape[-2:]
    rows = torch.arange(height + 2 * border, device=offsets.device) - offsets[:, :1]
    columns = torch.arange(width + 2 * border, device=offsets.device) - offsets[:, 1:]
    placed = _gather(images, rows.clamp(0, height - 1), columns.clamp(0, width - 1))
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    return placed * inside[:, None]


def _within(start: Tensor, length: int, size: int) -> Tensor:
    """(B, size) bool: which positions lie in [start, start + length)."""
    position = torch.arange(size, device=start.device) - start[:, None]
    return (position >= 0) & (position < length)


def _with_translation(batch: Batch, translation: Tensor) -> Batch:
    return dataclasses.replace(batch, factors={**batch.factors, "translation": translation.to(torch.float32)})
