"""Feeding the device: order, grouping into steps, and the clock that data wait is read from."""

import time
from collections.abc import Iterator, Sequence

import torch

from distmoe.config import DataSection
from distmoe.contracts import Batch, DataSpec
from distmoe.data.augment import Augmenter
from distmoe.data.index_plan import IndexPlan, PlannedBatch
from distmoe.training.feed import Feed

SPEC = DataSpec("toy", (1, 4, 4), 2, ("a", "b"), (0.0,), (1.0,))


class SlowLoader:
    """Delivers the planned samples after a pause, and remembers whether it was closed."""

    def __init__(self, pause_s: float) -> None:
        self.pause_s = pause_s
        self.ended = 0

    def batches(self, planned: Sequence[PlannedBatch]) -> Iterator[Batch]:
        try:
            for one in planned:
                time.sleep(self.pause_s)
                ids = one.sample_ids[: one.num_valid]
                yield Batch(torch.zeros(len(ids), 1, 4, 4, dtype=torch.uint8), ids % 2, ids)
        finally:
            self.ended += 1

    def close(self) -> None:
        pass


def feed_of(loader: SlowLoader) -> Feed:
    return Feed(loader, Augmenter(DataSection(), SPEC, seed=0), torch.device("cpu"))


def test_micro_batches_come_grouped_by_step_and_make_up_the_plan():
    plan = IndexPlan(torch.arange(12), batch_size=6, accumulation=2, shuffle=False)
    with feed_of(SlowLoader(0.0)).training_steps(plan.epoch(0), epoch=0) as steps:
        seen = [[(micro.batch.sample_ids.tolist(), micro.last) for micro in step] for step in steps]
    assert seen == [[([0, 1, 2], False), ([3, 4, 5], True)], [([6, 7, 8], False), ([9, 10, 11], True)]]


def test_waiting_counts_the_loader_and_augmenting_does_not():
    loader = SlowLoader(0.02)
    feed = feed_of(loader)
    plan = IndexPlan(torch.arange(10), batch_size=2)
    with feed.training_steps(plan.epoch(0), epoch=0) as steps:
        for step in steps:
            for _ in step:
                time.sleep(0.01)  # the work of a step is not waiting
    # Four pauses: the run's first batch, which FFCV compiles for, is start-up. No upper bound, the machine may be busy,
    # and a sleep may end a clock tick early.
    assert feed.wait_s >= 4 * 0.019
    assert 0.0 < feed.augment_s < feed.wait_s


def test_leaving_an_epoch_early_ends_the_loaders_iterator():
    loader = SlowLoader(0.0)
    plan = IndexPlan(torch.arange(10), batch_size=2)
    with feed_of(loader).training_steps(plan.epoch(0), epoch=0) as steps:
        list(next(steps))
        assert loader.ended == 0
    assert loader.ended == 1


def test_evaluation_batches_are_the_planned_samples_once():
    plan = IndexPlan(torch.arange(7), batch_size=3, shuffle=False, drop_last=False)
    batches = list(feed_of(SlowLoader(0.0)).evaluation_batches(plan.epoch(0)))
    assert [batch.sample_ids.tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
