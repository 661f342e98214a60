"""Real processes of ``python -m distmoe train``, killed and stopped: what they leave behind is worth resuming."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distmoe.train import train
from distmoe.training.run_folder import RunFolder
from tests.conftest import REPOSITORY
from tests.runs import (
    assert_same_run,
    checkpoint_steps,
    last_state,
    metrics_lines,
    steps_logged,
    tiny_config,
    write_quadrants,
    write_tiny_config,
)

pytestmark = pytest.mark.launch

NUM_STEPS = 200
LONG = ("train.epochs=40", "train.evaluate_every_epochs=15", "train.checkpoint_every_steps=7", "train.ema_decay=0.99")
TIMEOUT_S = 120.0  # a machine that is busy with other tests takes long to import torch


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_quadrants(tmp_path / "quadrants.npz")


class Process:
    """A training process and what it wrote on standard error."""

    def __init__(self, config: Path, log: Path, *overrides: str, **environment: str):
        self.log = log
        with log.open("w") as stderr:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "distmoe", "train", str(config), *overrides],
                cwd=REPOSITORY,
                env=os.environ | environment,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )

    def wait_until(self, reached: Callable[[], bool]) -> None:
        give_up = time.monotonic() + TIMEOUT_S
        while not reached():
            assert self.popen.poll() is None, f"ended with {self.popen.returncode}:\n{self.log.read_text()}"
            assert time.monotonic() < give_up, f"nothing happens:\n{self.log.read_text()}"
            time.sleep(0.005)

    def end(self, number: int) -> int:
        self.popen.send_signal(number)
        return self.popen.wait(TIMEOUT_S)


Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts processes, and ends those that a failed test leaves behind."""
    started: list[Process] = []

    def start_one(config: Path, *overrides: str, **environment: str) -> Process:
        started.append(Process(config, tmp_path / f"log{len(started)}", *overrides, **environment))
        return started[-1]

    yield start_one
    for process in started:
        process.popen.kill()
        process.popen.wait()


def test_killed_stopped_and_resumed_is_undisturbed(start: Start, data: Path, tmp_path: Path):
    overrides = (*LONG, "run.name=killed", "run.keep_checkpoints=3")
    config = write_tiny_config(data, tmp_path / "runs", *overrides)
    killed = RunFolder(tmp_path / "runs" / "killed")
    process = start(config)
    process.wait_until(lambda: steps_logged(killed) >= 20)
    time.sleep(random.Random(0).uniform(0.0, 0.3))  # the moment is any: inside a step, between two, while saving
    assert process.end(signal.SIGKILL) == -signal.SIGKILL
    logged, saved = steps_logged(killed), checkpoint_steps(killed)
    assert 20 <= logged < NUM_STEPS, "the run was over before it was killed"
    assert logged - 7 <= saved[-1] <= logged + 1

    # Another process dies while it writes a checkpoint, and a disk loses the end of the newest one.
    half_written = killed.checkpoints().root / f".writing-step-{saved[-1] + 7}"
    shutil.copytree(killed.checkpoints().path(saved[-1]), half_written)
    (half_written / "state.json").unlink()
    tensors = killed.checkpoints().path(saved[-1]) / "tensors-00001-of-00001.safetensors"
    os.truncate(tensors, tensors.stat().st_size // 2)

    # A launcher that restarts a process does not change its command line.
    log = stop(start(config, TORCHELASTIC_RESTART_COUNT="1"), killed, logged + 5, signal.SIGTERM, 143)
    assert f"step-{saved[-1]}: {tensors.name} is damaged" in log
    assert f"resuming {killed.path} from step {saved[-2]} of {NUM_STEPS}" in log
    assert not half_written.exists()
    log = stop(start(config, "run.resume=true"), killed, steps_logged(killed) + 5, signal.SIGINT, 130)
    assert "damaged" not in log

    train(tiny_config(data, tmp_path / "runs", *overrides, "run.resume=true"))
    assert [line["step"] for line in metrics_lines(killed) if "split" not in line] == list(range(1, NUM_STEPS + 1))
    whole = tiny_config(data, tmp_path / "runs", *overrides, "run.name=whole")
    train(whole)
    assert_same_run(killed, RunFolder.of(whole))


def stop(process: Process, folder: RunFolder, step: int, number: int, code: int) -> str:
    """Sends a signal once ``step`` is done, checks that all steps done are saved, and gives the log."""
    process.wait_until(lambda: steps_logged(folder) >= step)
    assert process.end(number) == code, process.log.read_text()
    assert last_state(folder).progress.step == steps_logged(folder) < NUM_STEPS
    assert folder.read_summary() is None
    log = process.log.read_text()
    assert "Traceback" not in log
    return log


def test_second_interrupt_stops_at_once(start: Start, data: Path, tmp_path: Path):
    # A step is made of 160 micro-batches, so that it is still under way when the second signal comes.
    slow = ("data.batch_size=160", "train.accumulation=160", "train.epochs=1000")
    config = write_tiny_config(data, tmp_path / "runs", *slow)
    process = start(config)
    folder = RunFolder(tmp_path / "runs" / "run")
    process.wait_until(lambda: steps_logged(folder) >= 2)
    process.popen.send_signal(signal.SIGINT)
    process.wait_until(lambda: "to stop at once" in process.log.read_text())
    assert process.end(signal.SIGINT) == 130
    log = process.log.read_text()
    assert "Traceback" not in log
    assert "go on with run.resume=true" not in log  # it did not wait for the step's end to save
