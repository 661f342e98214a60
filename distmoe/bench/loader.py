"""Speed of the data feed: FFCV and the resident loader beside torchvision's way, all measured in one run.

Every candidate is measured once a round, and the rounds go through the candidates forwards and backwards in turn, so
that a machine that slows down for a while slows all of them. Ratios are taken inside a round.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100

from distmoe.bench.estimate import MIN_ROUNDS, Estimate, estimate
from distmoe.config import DataSection
from distmoe.contracts import Batch, DataSpec, UserError
from distmoe.data.augment import Augmenter
from distmoe.data.datasets import load_split
from distmoe.data.index_plan import IndexPlan
from distmoe.data.loaders import OpenData, open_data
from distmoe.data.loaders.protocol import Loader
from distmoe.data.split import Array, Split, is_image_shape

_PEER_IMAGES = 5_120  # a round of torchvision's path: it is a hundred times slower, so a part of an epoch must do
_CROP_PADDING = 4
_TORCHVISION_SETS: dict[str, Any] = {"cifar10": CIFAR10, "cifar100": CIFAR100}


@dataclass(frozen=True)
class LoaderRow:
    """One line of the table.

    Attributes:
        name: Who delivers.
        delivers: ``raw`` (stored values) or ``augmented`` (flipped, cropped, normalised: ready for a model).
        images_per_second: As delivered to one consumer that drops them.
        ratio: To the fastest torchvision row that delivers the same; None for that row itself.
        first_batch_s: From opening the data set to its first batch: checks, FFCV's import and compilation included.
    """

    name: str
    delivers: str
    images_per_second: Estimate
    ratio: Estimate | None
    first_batch_s: float


@dataclass
class _Candidate:
    name: str
    delivers: str
    batches: Callable[[int], Iterator[Any]]  # of a round
    images: int  # of a round
    first_batch_s: float
    is_peer: bool = False


def bench_loader(data: DataSection, rounds: int = 15, batch_size: int = 512, workers: Sequence[int] = (0, 2)) -> str:
    """Measures all loaders on a data set; see :func:`measure_loaders`.

    Returns:
        The table as text.
    """
    rows = measure_loaders(data, rounds, batch_size, workers)
    header = (
        f"data.name={data.name}, {rounds} rounds, {len(os.sched_getaffinity(0))} CPU cores, "
        f"{torch.get_num_threads()} torch threads; median and 95 % interval"
    )
    return f"{header}\n{format_table(rows)}"


def measure_loaders(data: DataSection, rounds: int, batch_size: int, workers: Sequence[int]) -> list[LoaderRow]:
    """Measures FFCV and the resident loader with our augmentation, and torch's DataLoader with torchvision's.

    Args:
        data: The data set; prepared if it has not been. ``data.loader`` is ignored.
        rounds: Measurements of each candidate; at least 6, below which a median has no 95 % interval.
        batch_size: Samples of a batch; our own loaders are measured with ``data.batch_size`` as well.
        workers: Worker processes of the DataLoaders. They are spawned: forked ones may crash beside FFCV's threads.

    Raises:
        UserError: The data set cannot be opened.
    """
    if rounds < MIN_ROUNDS:
        raise UserError(f"{rounds} rounds are too few for a 95 % interval: at least {MIN_ROUNDS} are needed")
    opened: list[OpenData] = []
    try:
        candidates: list[_Candidate] = []
        for loader in ("ffcv", "resident"):
            candidates += _ours(data.model_copy(update={"loader": loader}), batch_size, opened)
        candidates += _peers(data, opened[0].spec, batch_size, workers)
        seconds = _measure(candidates, rounds)
    finally:
        for data_set in opened:
            data_set.close()
    return _rows(candidates, seconds)


def format_table(rows: Sequence[LoaderRow]) -> str:
    """The rows as aligned text, one line each below a header."""
    lines = [("loader", "delivers", "images/s", "x torchvision", "first batch")]
    for row in rows:
        ratio = "1" if row.ratio is None else _format(row.ratio, ".3g")
        lines.append(
            (row.name, row.delivers, _format(row.images_per_second, ",.0f"), ratio, f"{row.first_batch_s:.2f} s")
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _format(value: Estimate, how: str) -> str:
    return f"{value.median:{how}} ({value.low:{how}} to {value.high:{how}})"


def _measure(candidates: list[_Candidate], rounds: int) -> list[list[float]]:
    """Seconds per candidate and round; the first round is for warming up and not returned."""
    seconds: list[list[float]] = [[] for _ in candidates]
    for number in range(rounds + 1):
        order = range(len(candidates)) if number % 2 else reversed(range(len(candidates)))
        for index in order:
            start = time.perf_counter()
            for _ in candidates[index].batches(number):
                pass
            seconds[index].append(time.perf_counter() - start)
    return [measured[1:] for measured in seconds]


def _rows(candidates: list[_Candidate], seconds: list[list[float]]) -> list[LoaderRow]:
    speeds = [
        [candidate.images / value for value in measured]
        for candidate, measured in zip(candidates, seconds, strict=True)
    ]
    estimates = [estimate(values) for values in speeds]
    rows = []
    for index, candidate in enumerate(candidates):
        peers = [i for i, other in enumerate(candidates) if other.is_peer and other.delivers == candidate.delivers]
        best = max(peers, key=lambda i: estimates[i].median)
        ratios = [ours / theirs for ours, theirs in zip(speeds[index], speeds[best], strict=True)]
        ratio = None if index == best else estimate(ratios)
        rows.append(LoaderRow(candidate.name, candidate.delivers, estimates[index], ratio, candidate.first_batch_s))
    return rows


def _ours(data: DataSection, batch_size: int, opened: list[OpenData]) -> list[_Candidate]:
    start = time.perf_counter()
    data_set = open_data(data)
    opened.append(data_set)
    loader, num_samples = data_set.loaders["train"], data_set.num_samples["train"]
    sizes = sorted({min(size, num_samples) for size in (batch_size, data.batch_size)}, reverse=True)
    plans = [IndexPlan(torch.arange(num_samples), size) for size in sizes]
    list(loader.batches(plans[0].epoch(0)[:1]))
    first_batch_s = time.perf_counter() - start

    prepare = _Augmentation(data, data_set.spec)
    candidates = []
    for delivers, plan in itertools.product(("raw", "augmented"), plans):
        batches = partial(_epoch, loader, plan, prepare if delivers == "augmented" else None)
        name = f"{data.loader}, batch {plan.batch_size}"
        candidates.append(_Candidate(name, delivers, batches, plan.num_steps * plan.batch_size, first_batch_s))
    return candidates


class _Augmentation:
    """Our augmentation and normalisation, as a training step has them done on the CPU."""

    def __init__(self, data: DataSection, spec: DataSpec) -> None:
        self._augmenter = Augmenter(data, spec, seed=0)
        shape = (-1, 1, 1) if len(spec.input_shape) == 3 else (-1,)
        self._mean, self._std = (torch.tensor(values).reshape(shape) for values in (spec.mean, spec.std))

    def __call__(self, batch: Batch, epoch: int) -> Tensor:
        return (self._augmenter.train(batch, epoch).images - self._mean) / self._std


def _epoch(loader: Loader, plan: IndexPlan, augment: _Augmentation | None, number: int) -> Iterator[Any]:
    batches = loader.batches(plan.epoch(number))
    return batches if augment is None else (augment(batch, number) for batch in batches)


class _ArrayDataset(Dataset[tuple[Any, int]]):
    """A split as torch's DataLoader wants it, for the sets that torchvision does not know as colour images."""

    def __init__(self, split: Split, transform: Callable[[Any], Tensor]) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.split.inputs[index]), int(self.split.labels[index])


def _peers(data: DataSection, spec: DataSpec, batch_size: int, workers: Sequence[int]) -> list[_Candidate]:
    candidates = []
    for delivers, num_workers in itertools.product(("raw", "augmented"), workers):
        start = time.perf_counter()
        dataset = _peer_dataset(data, spec, delivers)
        size = min(batch_size, len(dataset))
        images = min(_PEER_IMAGES, len(dataset)) // size * size
        loader = DataLoader(
            dataset,
            size,
            sampler=RandomSampler(dataset, num_samples=images),
            num_workers=num_workers,
            multiprocessing_context="spawn" if num_workers else None,
            persistent_workers=num_workers > 0,
        )
        batches = iter(loader)
        next(batches)
        first_batch_s = time.perf_counter() - start
        for _ in batches:  # to its end, so that no worker reads ahead while others are measured
            pass
        name = f"torchvision, {num_workers} workers, batch {size}"
        candidates.append(_Candidate(name, delivers, partial(_iterate, loader), images, first_batch_s, is_peer=True))
    return candidates


def _iterate(loader: DataLoader[Any], number: int) -> Iterator[Any]:
    return iter(loader)


def _peer_dataset(data: DataSection, spec: DataSpec, delivers: str) -> Any:
    if data.name in _TORCHVISION_SETS:
        transform = _image_transform(spec) if delivers == "augmented" else transforms.PILToTensor()
        return _TORCHVISION_SETS[data.name](data.root, train=True, transform=transform)
    split = load_split(data, "train")
    if delivers == "raw":
        return _ArrayDataset(split, torch.from_numpy)
    if split.inputs.dtype == np.uint8 and is_image_shape(split.inputs.shape[1:]):
        return _ArrayDataset(split, transforms.Compose([transforms.ToPILImage(), _image_transform(spec)]))
    return _ArrayDataset(split, partial(_normalized, spec))


def _image_transform(spec: DataSpec) -> Any:
    """The usual recipe for small images; ``spec`` is in stored units, which ToTensor divides by 255."""
    mean, std = ([value / 255 for value in values] for values in (spec.mean, spec.std))
    crop = transforms.RandomCrop(spec.input_shape[1:], padding=_CROP_PADDING)
    return transforms.Compose(
        [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(mean, std)]
    )


def _normalized(spec: DataSpec, sample: Array) -> Tensor:
    shape = (-1,) if sample.ndim == 1 else (1,) * (sample.ndim - 1) + (-1,)
    mean, std = (torch.tensor(values).reshape(shape) for values in (spec.mean, spec.std))
    return (torch.from_numpy(sample) - mean) / std
