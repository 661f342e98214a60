"""``data``: what is learned from, and how it is fed."""

from typing import Literal

from pydantic import model_validator

from distmoe.config.base import NonNegativeInt, PathText, PositiveInt, Section, Share


class AugmentSection(Section):
    """Training-time augmentation, on the device; a value of null means the data set's own default."""

    flip: Literal["none", "random", "alternating"] | None = None
    """Mirror left-right: never, by a coin each epoch, or a coin in the first epoch and in turn afterwards."""
    crop_padding: NonNegativeInt | None = None
    """Pad by this many pixels (mirrored) and cut a random window of the original size; 0 is off."""
    cutout: NonNegativeInt | None = None
    """Side in pixels of a square at a random place that is painted with the mean colour; 0 is off."""


class SyntheticSection(Section):
    """The built-in procedural set: shape x texture at random places and scales, 32x32 colour, 10 classes."""

    difficulty: Share = 0.5
    """0 is easy, 1 is hard: contrast falls, noise and clutter grow."""
    train_size: PositiveInt = 20_000
    """Number of training samples."""
    test_size: PositiveInt = 4_000
    """Number of test samples."""


DataName = Literal["cifar10", "cifar100", "mnist", "fashionmnist", "translated_mnist", "synthetic", "arrays"]


class DataSection(Section):
    """What is learned from, and how it is fed."""

    name: DataName = "synthetic"
    """Data set."""
    root: PathText = ".data"
    """Folder with the original files, in torchvision's layout."""
    prepared_dir: PathText | None = None
    """Folder of the prepared ``.beton`` files; default: ``data.root``."""
    path: PathText | None = None
    """The ``.npz`` file of data set ``arrays``: ``inputs``, ``labels``, optional factor columns; see docs/data.md."""
    loader: Literal["ffcv", "resident"] = "ffcv"
    """``ffcv`` reads ``.beton`` files; ``resident`` keeps the whole set in memory and needs no extra package."""
    batch_size: PositiveInt = 256
    """Samples of one optimizer step, over all ranks and micro-batches."""
    eval_batch_size: PositiveInt = 500
    """Samples of one evaluation batch, over all ranks."""
    validation_size: NonNegativeInt = 5_000
    """Samples cut from the training set for validation, the same ones for every seed; 0: no validation."""
    drop_last: bool = True
    """Leave out the last, partial batch of a training epoch."""
    normalize: Literal["standard", "unit", "none"] = "standard"
    """Of the model's input: (x - mean) / std of the training set, x / 255, or x."""
    augment: AugmentSection = AugmentSection()
    """Training-time augmentation."""
    synthetic: SyntheticSection = SyntheticSection()
    """Settings of data set ``synthetic``."""

    @model_validator(mode="after")
    def _check(self) -> "DataSection":
        if self.name == "arrays" and self.path is None:
            raise ValueError("data.path must name the .npz file when data.name is arrays")
        if self.name != "arrays" and self.path is not None:
            raise ValueError(f"data.path is only read by data.name=arrays, not {self.name}: remove it")
        return self
