"""The data wait of a training step: a loader that is made slow must show."""

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from distmoe.bench.data_wait import bench_data_wait
from distmoe.contracts import Batch
from distmoe.data.index_plan import PlannedBatch
from distmoe.data.loaders.resident import ResidentLoader
from tests.runs import tiny_config, write_quadrants

PAUSE_S = 0.05


def test_slow_loader_is_the_one_that_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    deliver = ResidentLoader.batches

    def slow(self: ResidentLoader, planned: Sequence[PlannedBatch]) -> Iterator[Batch]:
        for batch in deliver(self, planned):
            time.sleep(PAUSE_S)
            yield batch

    monkeypatch.setattr(ResidentLoader, "batches", slow)
    config = tiny_config(write_quadrants(tmp_path / "set.npz"), tmp_path / "runs", "data.batch_size=16")
    table = bench_data_wait(config, rounds=6)
    shares = {name: float(share) for name, share in re.findall(r"^(ffcv|resident) +([\d.]+)%", table, re.MULTILINE)}
    # A step of this network takes a few milliseconds: next to 50 ms of pause it is nearly nothing.
    assert shares["resident"] > 60.0 > shares["ffcv"]
    assert not (tmp_path / "runs").exists()  # measured, not run
