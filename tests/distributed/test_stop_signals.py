"""A launcher is killed: what it has started gets to know, and ends."""

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import FileStore

import distmoe.train as flow
from distmoe import cli
from distmoe.parallel.stop_signals import Interrupted
from distmoe.parallel.world import World
from tests.runs import checkpoint_steps, folder_of, tiny_config, write_quadrants

pytestmark = pytest.mark.distributed

LIMIT_S = 60.0
PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quadrants(tmp_path_factory.mktemp("data") / "quadrants.npz")


def _kill_launcher() -> None:
    """The parent is gone when this returns, and its signal has come."""
    launcher = os.getppid()
    os.kill(launcher, signal.SIGKILL)
    while os.getppid() == launcher:
        time.sleep(0.01)
    time.sleep(0.1)


def _in_training() -> World:
    real = flow.train_step

    def train_step(engine: Any, model: Any, mixtures: Any, config: Any, number: int, *rest: Any) -> Any:
        if number == 3:
            _kill_launcher()
        return real(engine, model, mixtures, config, number, *rest)

    flow.train_step = train_step
    return World(launch="launcher")


def _while_loading() -> World:
    real = flow.open_session

    def open_session(*args: Any) -> Any:
        _kill_launcher()
        return real(*args)

    flow.open_session = open_session
    return World(launch="launcher")


def _while_waiting(store: Path) -> World:
    """For a rank that does not come."""
    threading.Timer(0.5, _kill_launcher).start()
    return World(0, 2, 0, 2, launch="launcher", store=FileStore(str(store), 2))


MOMENTS: dict[str, Callable[[Path], World]] = {
    "training": lambda folder: _in_training(),
    "loading": lambda folder: _while_loading(),
    "waiting": lambda folder: _while_waiting(folder / "store"),
}


def _train(moment: str, folder: Path, data: Path) -> None:
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    world = MOMENTS[moment](folder)

    def command() -> None:
        try:
            flow.train(tiny_config(data, folder / "runs", f"parallel.timeout_s={LIMIT_S}"), world)
        except Interrupted as stop:
            raise SystemExit(128 + stop.signal_number) from None

    cli.end_with(command)


def _fork(function: Callable[[], object]) -> int:
    """The id of a new process that does this and no more."""
    pid, code = os.fork(), 99
    if pid == 0:
        try:
            function()
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            os._exit(code)
    return pid


def _launch(moment: str, folder: Path, data: Path) -> None:
    """Starts a launcher that starts a rank; writes how the rank has ended, whose next parent this process is."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    launcher = _fork(lambda: os.waitpid(_fork(lambda: _train(moment, folder, data)), 0))
    ends = dict(os.wait() for _ in range(2))
    assert os.waitstatus_to_exitcode(ends.pop(launcher)) == -signal.SIGKILL
    (folder / "end").write_text(str(os.waitstatus_to_exitcode(*ends.values())))


# How a rank ends, and which steps it has saved.
ENDS = {"training": (143, [4]), "loading": (143, []), "waiting": (-signal.SIGTERM, [])}


@pytest.mark.parametrize("moment", MOMENTS)
def test_rank_does_not_outlive_its_launcher(moment: str, data: Path, tmp_path: Path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.failing"])
    process = context.Process(target=_launch, args=(moment, tmp_path, data))
    process.start()
    try:
        process.join(LIMIT_S)
    finally:
        process.kill()
    code, steps = ENDS[moment]
    log = (tmp_path / "log").read_text()
    assert (tmp_path / "end").exists(), log
    assert int((tmp_path / "end").read_text()) == code, log
    assert checkpoint_steps(folder_of(tiny_config(data, tmp_path / "runs"))) == steps
