"""The starts of a run: which one is a launcher's restart, how they ended, and when restarts are of no use."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

import distmoe.train as flow
from distmoe.contracts import UserError
from distmoe.parallel import runtime
from distmoe.parallel.control import Control
from distmoe.parallel.endings import LostRanksError, PeerFailureError
from distmoe.parallel.stop_signals import Interrupted
from distmoe.training.attempts import Attempt, Attempts
from distmoe.training.run_folder import RunFolder
from tests.runs import checkpoint_steps, tiny_config, write_quadrants

KILLED = "ended without a word: killed, or its host was lost"


def begun(folder: Path, step: int = 0, launches: tuple[str, ...] = (), restart: bool = False) -> Attempts:
    """A start that rank 0 has noted."""
    attempts = Attempts(folder)
    attempts.begin(Control(), step, launches, restart, retries=9)
    return attempts


def end(attempts: Attempts, rank: int = 0, error: BaseException | None = None) -> None:
    with contextlib.suppress(BaseException), attempts.ends_noted(rank):
        if error is not None:
            raise error


ENDS: dict[str, tuple[int, BaseException | None, str | None]] = {
    "well": (0, None, None),
    "well, on another rank": (1, None, KILLED),  # rank 0 says so for all
    "stopped by a signal, and saved": (0, Interrupted(15), None),
    "with a defect": (0, KeyError("weights"), "rank 0: KeyError: 'weights'"),
    "with a defect of another rank": (2, RuntimeError("no\nstack"), "rank 2: RuntimeError: no"),
    "with a user's error": (0, UserError("data.path (x) is no file"), "rank 0: data.path (x) is no file"),
    "with another rank's error": (0, PeerFailureError("rank 1 failed in step 3", 1), KILLED),
    "with others lost": (0, LostRanksError("rank 1 (host b)"), "rank 0: LostRanksError: rank 1 (host b)"),
    "stopped at once": (0, KeyboardInterrupt(), "rank 0: stopped by SIGINT"),
    "stopped before there was anything to save": (0, SystemExit(143), "rank 0: stopped (exit code 143)"),
}


@pytest.mark.parametrize("case", ENDS)
def test_end_of_a_start_is_noted(case: str, tmp_path: Path):
    rank, error, failure = ENDS[case]
    end(begun(tmp_path, step=5, launches=("host a 1", "host b 2"), restart=True), rank, error)
    assert Attempts(tmp_path).read() == [Attempt(5, ("host a 1", "host b 2"), True, failure)]


def test_error_passes_through(tmp_path: Path):
    with pytest.raises(KeyError, match="weights"), begun(tmp_path).ends_noted(0):
        raise KeyError("weights")


def test_of_several_ranks_the_first_has_the_cause(tmp_path: Path):
    attempts = begun(tmp_path)
    end(attempts, 1, UserError("the disk is full"))
    end(attempts, 0, LostRanksError("the store cannot be reached"))  # a consequence
    end(begun(tmp_path, 3), 0, KeyError("second"))
    failures = [one.failure for one in Attempts(tmp_path).read()]
    assert failures == ["rank 1: the disk is full", "rank 0: KeyError: 'second'"]


def test_start_that_is_refused_says_nothing_of_the_one_that_is_running(tmp_path: Path):
    begun(tmp_path)
    before = (tmp_path / "attempts.jsonl").read_bytes()
    for rank in (0, 1):
        end(Attempts(tmp_path), rank, UserError("another process trains in it"))
        end(Attempts(tmp_path), rank)
    assert (tmp_path / "attempts.jsonl").read_bytes() == before


def test_start_is_noted_once_and_where_there_is_a_folder(tmp_path: Path):
    attempts = Attempts(tmp_path / "run")
    attempts.begin(Control(), 0, (), restart=True, retries=0)
    end(attempts, 0, KeyError("too early"))
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    for step in (4, 5):
        attempts.begin(Control(), step, (), restart=True, retries=0)
    assert Attempts(tmp_path / "run").read() == [Attempt(4, (), True, KILLED)]


def test_what_a_crash_has_cut_off_is_left_out(tmp_path: Path):
    path = tmp_path / "attempts.jsonl"
    end(begun(tmp_path, 1), 0, KeyError("first"))
    whole = path.read_bytes()
    begun(tmp_path, 2)
    second = path.read_bytes()[len(whole) :]
    for cut in range(1, len(second), 5):
        path.write_bytes(whole + second[:cut])  # of a full disk
        end(begun(tmp_path, 3), 0, KeyError("third"))
        ours = [(one.step, one.failure) for one in Attempts(tmp_path).read()]
        assert ours[0] == (1, "rank 0: KeyError: 'first'"), cut
        assert ours[-1] == (3, "rank 0: KeyError: 'third'"), cut
    path.write_bytes(b'{"failure": "of nobody"}\n\xff\xfe\n[1]\n7\n{"step": 1}\n' + whole + b'{"time": 3}\n')
    assert [(one.step, one.failure) for one in Attempts(tmp_path).read()] == [(1, "rank 0: KeyError: 'first'")]


def test_full_disk_stops_no_run(tmp_path: Path):
    attempts = Attempts(tmp_path)
    (tmp_path / "attempts.jsonl").mkdir()  # cannot be written
    attempts.begin(Control(), 0, (), restart=True, retries=0)
    end(attempts, 0, KeyError("seen"))
    assert attempts.read() == []


@pytest.mark.parametrize(
    ("restarts", "launches", "restart"),
    [
        (0, ["a"], True),  # a host has joined, which is not counted
        (0, ["b", "x"], True),
        (0, ["b", "a"], True),
        (1, ["a"], True),
        (0, ["x"], False),
        (1, ["x"], False),  # it was refused before, and torchrun tries again: the folder is somebody else's
        (0, [], False),
        (1, [], True),  # a launcher that is known by its count alone
        (0, ["slurm job c 7"], False),  # another training of the same job
        (1, ["slurm job c 7"], True),
        (1, ["slurm job c 8"], False),
    ],
)
def test_launcher_that_has_started_a_run_before_starts_it_again(
    restarts: int, launches: list[str], restart: bool, tmp_path: Path
):
    begun(tmp_path, launches=("a", "b", "slurm job c 7"))
    begun(tmp_path, launches=("c",))
    assert Attempts(tmp_path).is_restart(restarts, launches) == restart
    if launches:
        assert not Attempts(tmp_path / "none").is_restart(restarts, launches)


# What has been, (step, restart, failure) of each start; then the step of a restart, the retries, and what is said if it
# is refused.
HISTORIES: dict[str, tuple[list[tuple[int, bool, str | None]], int, int, str | None]] = {
    "none": ([], 0, 0, None),
    "none allowed": ([(0, False, "x")], 0, 0, "once from step 0, .*; the first time: x"),
    "as many as allowed": ([(0, False, "x"), (0, True, "y"), (0, True, "z")], 0, 3, None),
    "one more": ([(0, False, "x"), (0, True, "y"), (0, True, "z")], 0, 2, "3 times from step 0, .*; the first time: x"),
    "all killed": ([(4, False, KILLED), (4, True, KILLED)], 4, 1, f"2 times from step 4, .*time: {KILLED}"),
    "progress since": ([(0, False, "x"), (0, True, "y"), (3, True, "z")], 3, 1, None),
    "progress by the last": ([(0, False, "x"), (0, True, "y")], 3, 0, None),
    "one in the middle saved": ([(0, False, "x"), (0, True, None), (0, True, "y")], 0, 1, None),
    "a user's start since": ([(0, False, "x"), (0, True, "y"), (0, False, "z")], 0, 1, None),
    "only those since": ([(0, False, "x"), (2, True, "y"), (2, True, "z")], 2, 1, "2 times from step 2, .*time: y"),
    "a checkpoint has been lost": ([(0, False, "w"), (0, True, "x"), (2, True, "y")], 0, 1, None),
}  # fmt: skip


@pytest.mark.parametrize("case", HISTORIES)
def test_restarts_end_that_come_no_further(case: str, tmp_path: Path):
    history, step, retries, refused = HISTORIES[case]
    for at, restart, failure in history:
        attempts = begun(tmp_path, at, restart=restart)
        if failure != KILLED:
            end(attempts, 0, None if failure is None else UserError(failure))
    before, attempts = len(Attempts(tmp_path).read()), Attempts(tmp_path)
    if refused is None:
        attempts.begin(Control(), step, (), restart=True, retries=retries)
        assert len(attempts.read()) == before + 1
        return
    cause = refused.replace(": ", ": (rank 0: )?")
    with pytest.raises(UserError, match=rf"^this run has failed {cause}\. Mend that and go on with run\.resume=true"):
        attempts.begin(Control(), step, (), restart=True, retries=retries)
    assert len(attempts.read()) == before
    attempts.begin(Control(), step, (), restart=False, retries=retries)  # a user says go on


# Whole runs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quadrants(tmp_path_factory.mktemp("data") / "quadrants.npz")


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heat maps take longer than the rest of a tiny run."""
    monkeypatch.setattr(SummaryWriter, "add_figure", lambda *args, **kwargs: None)


Start = Callable[..., None]


@pytest.fixture
def start(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """``start(*overrides, fails_at=N, restarts=R)`` starts a run that fails in step N, counted from 0."""
    real_step, failures = flow.train_step, iter(range(99))

    def started(*overrides: str, fails_at: int | None = None, restarts: int = 0) -> None:
        def train_step(engine: Any, model: Any, mixtures: Any, config: Any, number: int, *rest: Any) -> Any:
            if number == fails_at:
                raise RuntimeError(f"planted {next(failures)}")
            return real_step(engine, model, mixtures, config, number, *rest)

        with monkeypatch.context() as patched:
            patched.setattr(flow, "train_step", train_step)
            patched.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
            flow.train(tiny_config(data, tmp_path, *overrides))

    return started


def test_crash_loop_of_a_run_ends_with_its_first_cause(start: Start, tmp_path: Path):
    def fails(number: int, *overrides: str, restarts: int = 0) -> None:
        with pytest.raises(RuntimeError, match=rf"^planted {number}$"):
            start("run.retries=2", *overrides, fails_at=1, restarts=restarts)

    for restarts in range(3):
        fails(restarts, restarts=restarts)
    for restarts in (3, 4):
        with pytest.raises(
            UserError, match=r"3 times from step 0, .*; the first time: rank 0: RuntimeError: planted 0\. "
        ):
            start("run.retries=2", fails_at=1, restarts=restarts)
    fails(3, "run.resume=true")  # a user's start
    fails(4, restarts=1)  # and what follows it counts anew
    assert [one.failure for one in Attempts(tmp_path / "run").read()] == [
        f"rank 0: RuntimeError: planted {number}" for number in range(5)
    ]


def test_run_that_comes_further_each_time_is_never_refused(start: Start, tmp_path: Path):
    overrides = ("run.retries=0", "train.checkpoint_every_steps=1", "train.max_steps=3")
    for step in range(2):
        with pytest.raises(RuntimeError, match=rf"^planted {step}$"):
            start(*overrides, fails_at=step + 1, restarts=step)
    start(*overrides, restarts=2)
    attempts = Attempts(tmp_path / "run").read()
    assert [(one.step, one.failure is None) for one in attempts] == [(0, False), (1, False), (2, True)]


def test_restart_that_ends_while_it_loads_counts(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RuntimeError, match=r"^planted 0$"):
        start("run.retries=1", "train.checkpoint_every_steps=1", fails_at=1)

    def open_session(*args: Any) -> Any:
        raise MemoryError("the checkpoint")

    monkeypatch.setattr(flow, "open_session", open_session)
    for restarts in (1, 2):
        with pytest.raises(MemoryError):
            start("run.retries=1", restarts=restarts)
    with pytest.raises(UserError, match=r"2 times from step 1, .*first time: rank 0: MemoryError: the checkpoint"):
        start("run.retries=1", restarts=3)


def test_start_in_the_folder_of_a_running_one_is_not_counted(start: Start, tmp_path: Path):
    start("train.stop_after_steps=1")
    before = (tmp_path / "run" / "attempts.jsonl").read_bytes()
    with RunFolder(tmp_path / "run").held(), pytest.raises(UserError, match="another process trains in it"):
        start("run.resume=true")
    with pytest.raises(UserError, match="is not empty"):
        start()
    assert (tmp_path / "run" / "attempts.jsonl").read_bytes() == before


def test_torchrun_starts_a_run_again_without_counting(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As when a host joins: TORCHELASTIC_RESTART_COUNT stays 0."""
    watched: list[str] = []
    monkeypatch.setattr(runtime, "stop_with_launcher", lambda: watched.append("launcher"))  # not this one's parent
    given = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "run"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    start("train.stop_after_steps=1")
    with monkeypatch.context() as patched:  # another torchrun, and a person who has started it
        patched.setattr(os, "getppid", os.getpid)
        with pytest.raises(UserError, match=r"is not empty: continue that run with run\.resume=true"):
            start()
    assert checkpoint_steps(RunFolder(tmp_path / "run")) == [1]
    start("train.stop_after_steps=2")
    assert checkpoint_steps(RunFolder(tmp_path / "run")) == [1, 2]
    assert [(one.step, one.restart) for one in Attempts(tmp_path / "run").read()] == [(0, False), (1, True)]
    assert watched == ["launcher"] * 3


@pytest.mark.parametrize("value", ["-1", "1000001", "many"])
def test_retries_are_a_number(value: str, data: Path, tmp_path: Path):
    assert tiny_config(data, tmp_path, "run.retries=0").run.retries == 0
    with pytest.raises(UserError, match=r"run\.retries"):
        tiny_config(data, tmp_path, f"run.retries={value}")
