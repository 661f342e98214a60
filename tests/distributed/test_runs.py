"""Whole runs on several processes: the numbers of one process, written once, also where a rank has no samples."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import FileStore
from torch.utils.tensorboard import SummaryWriter

from distmoe.parallel.world import World
from distmoe.train import train
from distmoe.training.run_folder import RunFolder
from tests.distributed.ranks import run_ranks
from tests.runs import NUM_TEST, assert_same_run, folder_of, metrics_lines, tiny_config, write_quadrants

pytestmark = pytest.mark.distributed

REPLICAS = "parallel.expert_parallel_size=1"
# 150 samples in batches of 32: of the last one's 22, with rows for 32, four ranks get 8, 8, 6 and none.
PARTIAL = ("data.validation_size=50", "data.drop_last=false", "data.eval_batch_size=24", "train.max_steps=6")
CASES = {
    "partial": (*PARTIAL, REPLICAS, "moe.loss_weights.z=0.01", "train.clip_norm=0.5", "train.ema_decay=0.9"),
    "accumulated": (*PARTIAL, REPLICAS, "train.accumulation=2", "moe.loss_weights.load_balance=0"),
    # One of four ranks never has a sample, neither in training nor in the evaluation; of two, one has 1 of 3.
    "small": (REPLICAS, "data.batch_size=3", "data.eval_batch_size=3", "data.validation_size=4", "train.max_steps=4"),
    "whole": (REPLICAS, "train.max_steps=8", "train.log_every_steps=3"),
}
# The run of ``whole`` again, in parts that begin in the middle of a log interval and of an epoch.
PARTS = {"parts": "train.stop_after_steps=2", "parts again": "train.stop_after_steps=7", "parts to the end": "seed=0"}


def _check_runs(data: Path, folder: Path) -> dict[str, Any]:
    """What ``train`` gives for each case, and for the parts."""
    SummaryWriter.add_figure = lambda *args, **kwargs: None  # type: ignore[method-assign]  # drawing takes longest
    rank, size = dist.get_rank(), dist.get_world_size()
    resume = f"run.resume={str(rank > 0).lower()}"  # of a host whose launcher was started again, and of no other
    parts = {name: (*CASES["whole"], stop, "run.name=parts", resume) for name, stop in PARTS.items()}
    summaries = {}
    for name, overrides in (CASES | parts).items():
        config = tiny_config(data, folder, f"run.name={name.split()[0]}", *overrides)
        store = FileStore(str(folder / f"store of {name}"), size)
        summaries[name] = train(config, World(rank, size, rank, size, store=store))
    return summaries


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quadrants(tmp_path_factory.mktemp("data") / "quadrants.npz")


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """The same runs in one process."""
    runs = tmp_path_factory.mktemp("alone")
    configs = {name: tiny_config(data, runs, f"run.name={name}", *overrides) for name, overrides in CASES.items()}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SummaryWriter, "add_figure", lambda *args, **kwargs: None)
        for config in configs.values():
            train(config)
    return {name: folder_of(config) for name, config in configs.items()}


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_processes_write_what_one_writes(
    world_size: int, data: Path, alone: dict[str, RunFolder], tmp_path: Path
):
    summaries = run_ranks(_check_runs, world_size, data, tmp_path)
    assert summaries == [summaries[0]] * world_size, "ranks think differently of a run"
    for name, one in alone.items():
        folder = RunFolder(tmp_path / name)
        assert_same_numbers(metrics_lines(folder), metrics_lines(one), name)
        ours, theirs = evaluation_of(folder), evaluation_of(one)
        assert sum(map(sum, ours["confusion"])) == ours["samples"] == NUM_TEST
        assert [sum(row) for row in ours["confusion"]] == [sum(row) for row in theirs["confusion"]]
        # Top-k is discontinuous: a token of another expert moves a share by 1 / NUM_TEST.
        for layer, measures in theirs["layers"].items():
            assert ours["layers"][layer].keys() == measures.keys()
            assert ours["layers"][layer]["expert_load"] == pytest.approx(measures["expert_load"], abs=0.02)
        assert summaries[0][name]["world_size"] == world_size
        assert len(list(folder.tensorboard.iterdir())) == 1, "rank 0 alone writes events"
    assert (summaries[0]["parts"], summaries[0]["parts again"]) == (None, None)
    parts, whole = RunFolder(tmp_path / "parts"), RunFolder(tmp_path / "whole")
    assert_same_numbers(metrics_lines(parts), metrics_lines(whole), "parts")
    assert_same_run(parts, whole)


def assert_same_numbers(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], name: str) -> None:
    """Measure (c) of layout invariance: losses within 1e-6 over the first 3 steps, then within 1e-4."""
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert (our["step"], our["epoch"], our.get("split")) == (their["step"], their["epoch"], their.get("split"))
        close = {"rel": 1e-6 if our["step"] <= 3 and "split" not in our else 1e-4}
        for key in ("loss", "cross_entropy", "load_balance", "z"):
            if key in their:
                assert our[key] == pytest.approx(their[key], **close), f"{name}, step {our['step']}: {key}"
        for key in ("gradient_norm", "lr"):
            if key in their:
                assert our[key] == pytest.approx(their[key], rel=1e-3), f"{name}, step {our['step']}: {key}"


def evaluation_of(folder: RunFolder) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder.path / "evaluation.json").read_text())
    return values
