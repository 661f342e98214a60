"""Folders of a run: their room beside what the run will write, and whether they may be written."""

import errno
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from distmoe.config import RunConfig
from distmoe.contracts import DataSpec
from distmoe.doctor import storage
from distmoe.doctor.dataset import Dataset
from distmoe.doctor.findings import Finding, fail, ok, warn
from distmoe.doctor.storage import checkpoint_bytes, examine_storage
from distmoe.models import build_model
from distmoe.train import train
from tests.runs import folder_of, tiny_config, write_quadrants

Usage = namedtuple("Usage", "total used free")
MIB = 2**20
SPEC = DataSpec("arrays", (3, 8, 8), 4, tuple("0123"), (0.0,) * 3, (1.0,) * 3)


def set_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(2**30, 2**30 - free, free))


def examined(config: RunConfig, dataset: Dataset | None = None, here: bool = True) -> list[Finding]:
    return examine_storage(config, dataset or Dataset([], SPEC), here)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return tiny_config(tmp_path / "a.npz", tmp_path / "runs", "run.keep_checkpoints=3")


@pytest.mark.parametrize(
    ("overrides", "copies"),
    [
        (("optim.name=adamw",), 3),
        (("optim.name=adamw", "train.ema_decay=0.9"), 4),
        (("optim={name: sgd, lr: 0.1, momentum: 0.9}",), 2),
        (("optim={name: sgd, lr: 0.1, momentum: 0}",), 1),
    ],
)
def test_a_checkpoint_holds_weights_moments_averages_and_buffers(tmp_path: Path, overrides: Any, copies: int):
    config = tiny_config(tmp_path / "a.npz", tmp_path, *overrides)
    model = build_model(config, SPEC)
    weights = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert buffers > 0
    assert checkpoint_bytes(config, SPEC) == copies * 4 * weights + buffers


def test_a_huge_model_takes_neither_memory_nor_time(tmp_path: Path):
    config = tiny_config(tmp_path / "a.npz", tmp_path, "moe.num_experts=64", "model.ffn_hidden=33554432")
    # Each expert: 8 x 2^25 weights twice, and their biases: 137 GB of weights in all, three times.
    assert 3.2e11 / 3 < checkpoint_bytes(config, SPEC) / 3 < 3.2e11


def test_estimate_is_that_of_a_real_checkpoint(tmp_path: Path, config: RunConfig):
    write_quadrants(tmp_path / "a.npz")
    config = tiny_config(tmp_path / "a.npz", tmp_path / "runs", "train.stop_after_steps=2", "model.widths=[32, 64]")
    train(config)
    (folder,) = (folder_of(config).path / "checkpoints").iterdir()
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert checkpoint_bytes(config, SPEC) == pytest.approx(size, rel=0.1)


def test_room_for_the_newest_the_best_and_the_next(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "checkpoint_bytes", lambda config, spec: 10 * MIB)
    needed = 5 * 10 * MIB + 16 * MIB
    set_free(monkeypatch, needed)
    found = f"{config.run.dir}: 66 MiB of 1.0 GiB free; 5 checkpoints of 10 MiB"
    assert examined(config) == [ok("run.dir", found)]
    set_free(monkeypatch, needed - 1)
    assert examined(config) == [
        warn(
            "run.dir",
            f"{found}, in all 66 MiB on this disk",
            "free space there, or set run.dir to a folder on another disk, or lower run.keep_checkpoints",
        )
    ]


def test_checkpoints_that_are_there_need_no_more_room(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "checkpoint_bytes", lambda config, spec: 10 * MIB)
    folder = folder_of(config).path / "checkpoints" / "step-3"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"x" * 30 * MIB)
    set_free(monkeypatch, (50 - 30 + 16) * MIB)
    assert examined(config)[0].level == "ok"
    set_free(monkeypatch, (50 - 30 + 16) * MIB - 1)
    assert examined(config)[0].level == "warn"


def test_run_and_prepared_data_share_a_disk(config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(storage, "checkpoint_bytes", lambda config, spec: 10 * MIB)
    set_free(monkeypatch, 165 * MIB)  # of the 66 and 100 MiB
    run, data = examined(config, Dataset([], SPEC, 100 * MIB))
    assert (run.level, run.subject) == ("warn", "run.dir")
    assert data == warn(
        "data.root",
        f"{tmp_path}: 165 MiB of 1.0 GiB free; prepared data, in all 166 MiB on this disk",
        "free space there, or set data.root to a folder on another disk",
    )
    set_free(monkeypatch, 166 * MIB)
    assert [one.level for one in examined(config, Dataset([], SPEC, 100 * MIB))] == ["ok", "ok"]


def test_data_of_unknown_shape(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    set_free(monkeypatch, 100 * MIB)
    found = examined(config, Dataset())
    assert found == [ok("run.dir", f"{config.run.dir}: 100 MiB of 1.0 GiB free; checkpoints of unknown size")]


REFUSALS = {"read-only": errno.EROFS, "rights": errno.EACCES, "full": errno.ENOSPC, "quota": errno.EDQUOT}


@pytest.mark.parametrize("reason", REFUSALS)
def test_folder_that_cannot_be_written(reason: str, config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    error = OSError(REFUSALS[reason], "the reason")

    def refuse(dir: Path) -> Any:
        assert dir == tmp_path  # the nearest folder that is there
        raise error

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    found = (
        "run.dir",
        f"{config.run.dir} cannot be written (the reason: {tmp_path})",
        f"make {tmp_path} writable and leave space on it, or set run.dir to another folder",
    )
    assert examined(config) == [fail(*found)]
    assert examined(config, here=False) == [warn(*found)]


def test_folder_of_a_finished_run(config: RunConfig):
    folder = folder_of(config).path
    folder.mkdir(parents=True)
    (folder / "summary.json").touch()
    assert examined(config)[-1] == warn(
        "run folder",
        f"run folder {folder} is not empty",
        "continue that run with run.resume=true, or choose another run.name or run.dir",
    )
    resumed = config.model_copy(update={"run": config.run.model_copy(update={"resume": True})})
    assert [one.subject for one in examined(resumed)] == ["run.dir"]


def test_file_in_the_place_of_the_folder(config: RunConfig, tmp_path: Path):
    (tmp_path / "runs").touch()
    folder = folder_of(config).path
    message = f"run folder {folder}: {tmp_path}/runs is a file; choose another run.dir or run.name"
    assert examined(config)[1:] == [Finding("fail", "run folder", message)]
    assert examined(config, here=False)[1:] == [Finding("warn", "run folder", message)]


def test_model_that_does_not_fit_the_data(config: RunConfig):
    spec = DataSpec("arrays", (5,), 4, tuple("0123"), (0.0,), (1.0,))
    found = examined(config, Dataset([], spec))[0]
    assert found == Finding(
        "fail",
        "model",
        "model.name convnet needs images (channels, height, width), but data set arrays has samples of shape [5]",
    )
