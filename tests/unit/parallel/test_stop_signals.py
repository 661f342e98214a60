"""Signals that ask a run to stop: recorded while somebody can save, otherwise the end; told from a launcher's echo."""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from distmoe.parallel.stop_signals import StopSignals, stop_with_launcher

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def outcome_of(*numbers: int, stop: StopSignals) -> str:
    """What signals to this process do: nothing, or how they end it."""
    try:
        for number in numbers:
            os.kill(os.getpid(), number)
    except KeyboardInterrupt:
        return "interrupt"
    except SystemExit as end:
        return f"exit {end.code}"
    return "none" if stop.number is None else signal.Signals(stop.number).name


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Iterator[StopSignals]:
    for variable in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(variable, raising=False)
    stop = StopSignals()
    with stop.caught():
        yield stop


@pytest.mark.parametrize(
    ("number", "outcome"),
    [(signal.SIGINT, "interrupt"), (signal.SIGTERM, "exit 143"), (signal.SIGUSR1, "exit 138")],
)
def test_signal_that_nobody_acts_on_ends_the_process(number: int, outcome: str, stop: StopSignals):
    assert outcome_of(number, stop=stop) == outcome
    with stop.saving():
        assert outcome_of(number, stop=stop) == signal.Signals(number).name
    assert outcome_of(number, stop=stop) == outcome  # the saving is over


# What comes while somebody can save, and what becomes of it.
SEQUENCES = {
    "first of all": ((signal.SIGTERM,), "SIGTERM"),
    "warning, then the end": ((signal.SIGUSR1, signal.SIGTERM), "SIGUSR1"),  # Slurm
    "the same again": ((signal.SIGTERM, signal.SIGTERM, signal.SIGTERM), "SIGTERM"),
    "Ctrl-C, then a launcher's": ((signal.SIGINT, signal.SIGTERM), "SIGINT"),
    "Ctrl-C twice": ((signal.SIGINT, signal.SIGINT), "interrupt"),
    "Ctrl-C after another": ((signal.SIGTERM, signal.SIGINT), "interrupt"),
}


@pytest.mark.parametrize("case", SEQUENCES)
def test_only_a_second_interrupt_stops_a_run_that_saves(case: str, stop: StopSignals, caplog: pytest.LogCaptureFixture):
    numbers, outcome = SEQUENCES[case]
    with stop.saving():
        assert outcome_of(*numbers, stop=stop) == outcome
    name = signal.Signals(numbers[0]).name
    assert caplog.messages == [f"{name}: saving after this step, then stopping (Ctrl-C to stop at once)"]


@pytest.mark.parametrize(
    ("rank", "seconds", "outcome"),
    [("0", 1.9, "SIGINT"), ("0", 2.1, "interrupt"), (None, 0.0, "interrupt")],
    ids=["a launcher's echo", "a person's, later", "no launcher"],
)
def test_interrupt_that_a_launcher_passes_on_is_no_second_one(
    rank: str | None, seconds: float, outcome: str, stop: StopSignals, monkeypatch: pytest.MonkeyPatch
):
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    now = time.monotonic()
    with stop.saving():
        monkeypatch.setattr(time, "monotonic", lambda: now)
        assert outcome_of(signal.SIGINT, stop=stop) == "SIGINT"
        monkeypatch.setattr(time, "monotonic", lambda: now + seconds)
        assert outcome_of(signal.SIGINT, stop=stop) == outcome


def test_handlers_are_put_back(monkeypatch: pytest.MonkeyPatch):
    def own(number: int, frame: Any) -> None: ...

    outside = [signal.getsignal(number) for number in STOPS]
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a background job
        signal.signal(signal.SIGUSR1, own)
        before = [signal.getsignal(number) for number in STOPS]
        with StopSignals().caught():
            assert [number for number in STOPS if signal.getsignal(number) in before] == []
        assert [signal.getsignal(number) for number in STOPS] == before
    finally:
        for number, handler in zip(STOPS, outside, strict=True):
            signal.signal(number, handler)


def test_handler_that_is_not_pythons_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    installed: list[tuple[int, Any]] = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: installed.append((number, handler)))
    stop = StopSignals()
    with stop.caught():
        pass
    assert [number for number, _ in installed] == list(STOPS)  # none of them a second time, with None


def test_signals_of_another_threads_run_are_not_caught():
    before, seen = [signal.getsignal(number) for number in STOPS], []

    def run() -> None:
        with StopSignals().caught():
            seen.extend(signal.getsignal(number) for number in STOPS)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == before


def test_launcher_that_has_ended_meanwhile_is_a_signal_too(stop: StopSignals, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[int, ...]] = []  # of the system, which is not to watch over this process itself
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: SimpleNamespace(prctl=lambda *args: asked.append(args)))
    parents = iter([4711, 4711, 4711, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    with stop.saving():
        stop_with_launcher()
        assert stop.number is None
        stop_with_launcher()
        assert stop.number == signal.SIGTERM
    assert asked == [(1, signal.SIGTERM)] * 2  # PR_SET_PDEATHSIG
