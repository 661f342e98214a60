"""What is known of a data set once its samples are read: its description for models, and its fingerprint."""

import hashlib

import numpy as np

from distmoe.config import DataSection
from distmoe.contracts import DataSpec
from distmoe.data.datasets import DATASETS
from distmoe.data.split import Array, Split, is_image_shape

_CHUNK_VALUES = 1 << 18  # values turned to float64 at a time: 2 MiB, which stay in the processor's cache


def describe(data: DataSection, train: Split) -> DataSpec:
    """What a model has to know, from all samples of the training split, those later cut off for validation included.

    Mean and standard deviation are per channel for images and over all values otherwise, in the units of the stored
    data, summed in float64. Where the device adds an empty border (translated_mnist) they are of the enlarged image.
    """
    sample_shape = train.inputs.shape[1:]
    border = DATASETS[data.name].border
    input_shape = sample_shape
    share = 1.0  # of the model's input that is stored; the rest is 0
    if is_image_shape(sample_shape):
        height, width, channels = sample_shape
        input_shape = (channels, height + 2 * border, width + 2 * border)
        share = height * width / (input_shape[1] * input_shape[2])
    mean, square = _moments(train.inputs, channels=sample_shape[-1] if is_image_shape(sample_shape) else 1)
    mean, square = mean * share, square * share
    std = np.sqrt(np.maximum(square - mean**2, 0))
    # Rounding leaves a little variance to a constant channel; its scale does not matter, it must only not divide by 0.
    std = np.where(std > 1e-6 * np.maximum(np.abs(mean), 1e-30), std, 1.0)
    return DataSpec(
        name=data.name,
        input_shape=tuple(int(size) for size in input_shape),
        num_classes=len(train.class_names),
        class_names=train.class_names,
        mean=tuple(float(value) for value in mean),
        std=tuple(float(value) for value in std),
    )


def fingerprint(train: Split, test: Split) -> str:
    """A hash of every sample, label and factor of both splits: equal data, however stored, have equal fingerprints."""
    digest = hashlib.blake2b(digest_size=16)
    for split in (train, test):
        named = {"inputs": split.inputs, "labels": split.labels, **dict(sorted(split.factors.items()))}
        for name, values in named.items():
            digest.update(f"{name} {values.dtype.name} {values.shape}\n".encode())
            digest.update(np.ascontiguousarray(values).data.cast("B"))
    return digest.hexdigest()


def _moments(inputs: Array, channels: int) -> tuple[Array, Array]:
    """Mean of the values and of their squares, each (channels,) float64; channels are the last axis."""
    rows = inputs.reshape(len(inputs), -1)
    total, square = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
    step = max(1, _CHUNK_VALUES // rows.shape[1])
    for start in range(0, len(rows), step):
        wide = rows[start : start + step].astype(np.float64)
        total += wide.sum(axis=0)
        square += np.square(wide, out=wide).sum(axis=0)
    count = rows.size / channels
    return total.reshape(-1, channels).sum(axis=0) / count, square.reshape(-1, channels).sum(axis=0) / count
