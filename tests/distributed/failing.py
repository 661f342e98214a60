"""Runs a tiny training on several processes of which one fails on purpose: exit codes, common log, times."""

import errno
import importlib.metadata
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.distributed import FileStore

from distmoe import cli
from distmoe.contracts import UserError
from distmoe.data.loaders.resident import ResidentLoader
from distmoe.models.convnet import ConvNet
from distmoe.parallel import handshake, runtime
from distmoe.parallel.endings import say
from distmoe.parallel.engines.replicas import ReplicasEngine
from distmoe.parallel.heartbeat import BEAT_S
from distmoe.parallel.runtime import set_up_logging
from distmoe.parallel.stop_signals import Interrupted
from distmoe.parallel.world import World
from distmoe.train import train
from distmoe.training import checkpoint
from distmoe.training.metrics import MetricsFile
from tests.runs import tiny_config

STEP = 3  # the fault comes in this step, counted from 1
LIMIT_S = 90.0
OTHER_TORCH, OTHER_SOURCES = "2.0.1", "0123456789ab"

Fault = Callable[[], None]


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        codes: Exit code of each rank; of a killed one minus the signal.
        log: What all ranks have written on standard error, in the order in which they did.
        seconds: From the fault to the end of the last rank that ends by itself.
    """

    codes: list[int | None]
    log: list[str]
    seconds: float


def run_with_fault(
    world_size: int, folder: Path, data: Path, fault: tuple[int, str] | None, *overrides: str, stopped: int = -1
) -> Outcome:
    """Trains with a fault planted in one rank.

    Args:
        world_size: Number of processes.
        folder: An empty folder.
        data: Of :func:`tests.runs.write_quadrants`.
        fault: Which rank, and the name of one of :data:`FAULTS`; ``(-1, name)``: in all.
        overrides: Of the tiny run.
        stopped: A rank that does not end by itself.
    """
    # A server that has imported everything forks the ranks: torch's import would take longer than the test.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.failing"])
    log, fault_time = folder / "log", folder / "fault"
    processes: list[BaseProcess] = []
    for rank in range(world_size):
        name = fault[1] if fault is not None and fault[0] in (rank, -1) else ""
        processes.append(context.Process(target=_rank, args=(rank, world_size, folder, data, name, overrides)))
        processes[-1].start()
    try:
        give_up = time.monotonic() + LIMIT_S
        for rank, process in enumerate(processes):
            if rank != stopped:
                process.join(max(give_up - time.monotonic(), 0.0))
        ended = time.monotonic()
        assert [r for r, one in enumerate(processes) if one.is_alive() and r != stopped] == [], log.read_text()
    finally:
        for process in processes:
            process.kill()
            process.join()
    began = float(fault_time.read_text()) if fault_time.exists() else ended
    return Outcome([process.exitcode for process in processes], log.read_text().splitlines(), ended - began)


def _rank(rank: int, world_size: int, folder: Path, data: Path, fault: str, overrides: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    set_up_logging(rank)
    if fault:
        FAULTS[fault](lambda: (folder / "fault").write_text(str(time.monotonic())))
    world = World(rank, world_size, rank, world_size, store=FileStore(str(folder / "store"), world_size))

    own = [override.replace("RANK", str(rank)) for override in overrides]

    def command() -> None:
        try:
            train(tiny_config(data, folder / "runs", *own), world)
        except Interrupted as stop:
            raise SystemExit(128 + stop.signal_number) from None
        finally:
            if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
                say("distmoe: SIGTERM is somebody's whom nobody asked")

    cli.end_with(command)


def _in_call(owner: Any, name: str, number: int, fault: Fault) -> None:
    """``fault`` happens at the beginning of a method's or function's ``number``-th call."""
    real, calls = getattr(owner, name), 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            fault()
        return real(*args, **kwargs)

    setattr(owner, name, called)


def _raises(error: BaseException, note: Fault) -> Fault:
    def fault() -> None:
        note()
        raise error

    return fault


def _signals(number: int, note: Fault) -> Fault:
    def fault() -> None:
        note()
        os.kill(os.getpid(), number)

    return fault


def _stops_at_work(note: Fault) -> Fault:
    """Once its signs of life have told the others that it works alone, and that they are to wait."""

    def fault() -> None:
        time.sleep(2 * BEAT_S)
        _signals(signal.SIGSTOP, note)()

    return fault


def _in_batch(note: Fault) -> None:
    real = ResidentLoader.batches

    def batches(self: ResidentLoader, planned: Any) -> Iterator[Any]:
        for number, batch in enumerate(real(self, planned), start=1):
            if number == STEP:
                note()
                raise UserError("the planted file is damaged")
            yield batch

    ResidentLoader.batches = batches  # type: ignore[method-assign]


def _runs_other_torch(note: Fault) -> None:
    """As on a host that was not updated."""
    real = importlib.metadata.version
    importlib.metadata.version = lambda package: OTHER_TORCH if package == "torch" else real(package)
    _tells_of_exchanges(note)


def _runs_other_sources(note: Fault) -> None:
    handshake._digest_of_sources = lambda: OTHER_SOURCES  # type: ignore[assignment]
    _tells_of_exchanges(note)


def _does_not_say_what_it_runs(note: Fault) -> None:
    """As versions before there was a handshake."""
    runtime.publish_build = lambda store, rank: None
    _tells_of_exchanges(note)


def _tells_of_exchanges(note: Fault) -> None:
    note()
    _in_call(torch.distributed, "init_process_group", 1, lambda: say("distmoe: it begins to exchange"))


# Every model is called once before training, to count its work.
FAULTS: dict[str, Callable[[Fault], None]] = {
    "forward": lambda note: _in_call(ConvNet, "forward", STEP + 1, _raises(KeyError("planted"), note)),
    "backward": lambda note: _in_call(ReplicasEngine, "backward", STEP, _raises(RuntimeError("planted"), note)),
    "data": _in_batch,
    "saving": lambda note: _in_call(checkpoint, "write_pieces", 1, _raises(OSError(errno.ENOSPC, "disk full"), note)),
    "metrics": lambda note: _in_call(MetricsFile, "write", STEP, _raises(UserError("planted: no space"), note)),
    "defect in metrics": lambda note: _in_call(MetricsFile, "write", STEP, _raises(KeyError("planted"), note)),
    "killed": lambda note: _in_call(ConvNet, "forward", STEP + 1, _signals(signal.SIGKILL, note)),
    "stopped": lambda note: _in_call(ConvNet, "forward", STEP + 1, _signals(signal.SIGSTOP, note)),
    "stopped saving": lambda note: _in_call(checkpoint, "write_pieces", 1, _stops_at_work(note)),
    "interrupted": lambda note: _in_call(ConvNet, "forward", STEP + 1, _signals(signal.SIGINT, note)),
    "interrupted early": lambda note: _in_call(checkpoint.CheckpointFolder, "newest", 1, _signals(signal.SIGINT, note)),
    "other torch": _runs_other_torch,
    "other sources": _runs_other_sources,
    "silent": _does_not_say_what_it_runs,
    "not there": lambda note: _raises(SystemExit(0), note)(),
}
