"""Feeding the device: batches from a loader, moved, augmented, and timed."""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain, groupby, islice

import torch

from distmoe.contracts import Batch
from distmoe.data.augment import Augmenter
from distmoe.data.index_plan import PlannedBatch
from distmoe.data.loaders.protocol import Loader
from distmoe.training.step import MicroBatch


class Feed:
    """Turns a plan into batches on the device.

    Args:
        loader: Of the split.
        augmenter: Of the data set.
        device: Where batches go.

    Attributes:
        wait_s: Seconds spent, in all, until a ready, augmented batch was on the device.
        augment_s: The part of it spent on moving and augmenting.
    """

    def __init__(self, loader: Loader, augmenter: Augmenter, device: torch.device) -> None:
        self._loader = loader
        self._augmenter = augmenter
        self._device = device
        self._started = False
        self.wait_s = 0.0
        self.augment_s = 0.0

    @contextmanager
    def training_steps(self, planned: Sequence[PlannedBatch], epoch: int) -> Iterator[Iterator[Iterator[MicroBatch]]]:
        """The optimizer steps of a plan, each an iterator over its micro-batches, to be used up in turn.

        The very first batch is fetched here and not timed: FFCV compiles its reader for it, which is start-up.
        """
        with closing(_generator(self._loader.batches(planned))) as batches:
            first = [] if self._started else list(islice(batches, 1))
            self._started = True
            delivered = chain(first, batches)
            yield (
                self._micro_batches(list(group), delivered, epoch)
                for _, group in groupby(planned, key=lambda one: one.step)
            )

    def evaluation_batches(self, planned: Sequence[PlannedBatch]) -> Iterator[Batch]:
        """The batches of a plan without training-time augmentation."""
        with closing(_generator(self._loader.batches(planned))) as batches:
            for batch in batches:
                yield self._augmenter.evaluate(self._to_device(batch))

    def _micro_batches(
        self, group: Sequence[PlannedBatch], batches: Iterator[Batch], epoch: int
    ) -> Iterator[MicroBatch]:
        for number, planned in enumerate(group, start=1):
            asked = time.perf_counter()
            batch = next(batches)
            read = time.perf_counter()
            with self._one_thread():
                augmented = self._augmenter.train(self._to_device(batch), epoch)
            ready = time.perf_counter()
            self.wait_s += ready - asked
            self.augment_s += ready - read
            yield MicroBatch(augmented, planned.step_samples, planned.micro_samples, last=number == len(group))

    @contextmanager
    def _one_thread(self) -> Iterator[None]:
        """On a CPU, augmentation on one thread.

        The loader's thread fetches the next batch meanwhile: with all cores asked for, each small operation would
        wait for a core that is busy reading.
        """
        threads = torch.get_num_threads()
        if self._device.type != "cpu" or threads == 1:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def _to_device(self, batch: Batch) -> Batch:
        if self._device.type == "cpu":
            return batch
        return Batch(
            images=batch.images.to(self._device, non_blocking=True),
            labels=batch.labels.to(self._device, non_blocking=True),
            sample_ids=batch.sample_ids.to(self._device, non_blocking=True),
            factors={name: value.to(self._device, non_blocking=True) for name, value in batch.factors.items()},
        )


def _generator(batches: Iterator[Batch]) -> Generator[Batch, None, None]:
    """A generator, whose ``close`` also closes the loader's iterator."""
    try:
        yield from batches
    finally:
        close = getattr(batches, "close", None)
        if callable(close):
            close()
