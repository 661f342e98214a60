"""One of several processes fails: all end in time, with one exit code; the first cause is printed last and alone."""

import re
import signal
from pathlib import Path

import pytest

from tests.distributed.failing import STEP, Outcome, run_with_fault
from tests.runs import checkpoint_steps, folder_of, tiny_config, write_quadrants

pytestmark = pytest.mark.distributed

TIMEOUT_S = 16.0
# Replicas: importing DeepSpeed takes longer than a whole case here.
OVERRIDES = ("parallel.expert_parallel_size=1", f"parallel.timeout_s={TIMEOUT_S}", "train.checkpoint_every_steps=4")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quadrants(tmp_path_factory.mktemp("data") / "quadrants.npz")


def said(outcome: Outcome) -> list[str]:
    """What the ranks have said of their end; of a traceback, its first and its last line."""
    lines = [line for line in outcome.log if re.match(r"distmoe: |Traceback|\w+Error: ", line)]
    assert lines[-1] == outcome.log[-1], outcome.log
    return lines


def the_error(outcome: Outcome) -> str:
    """The only message besides the lines of ranks that came to the same point so late that they were told of it."""
    *told, error = said(outcome)
    assert [line for line in told if not re.match(r"distmoe: rank \d stopped: ", line)] == []
    return error


# The rank that fails, exit code of all, place, message as the others are told it, and the last lines of the log.
ALONE = {
    "forward": (1, 1, "forward", "KeyError: 'planted'", ["Traceback (most recent call last):", "KeyError: 'planted'"]),
    "backward": (
        2, 1, "backward", "RuntimeError: planted", ["Traceback (most recent call last):", "RuntimeError: planted"]
    ),
    "data": (1, 2, "data", "the planted file is damaged", ["distmoe: error: the planted file is damaged"]),
    "defect in metrics": (
        0, 1, "checks and log", "KeyError: 'planted'", ["Traceback (most recent call last):", "KeyError: 'planted'"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", ALONE)
def test_rank_that_throws_ends_all_and_speaks_last(fault: str, data: Path, tmp_path: Path):
    rank, code, place, message, last = ALONE[fault]
    outcome = run_with_fault(3, tmp_path, data, (rank, fault), *OVERRIDES)
    assert outcome.codes == [code] * 3, outcome.log
    others = [f"distmoe: rank {one} stopped: rank {rank} failed in step {STEP}, {place}: {message}" for one in range(3)]
    del others[rank]
    lines = said(outcome)
    assert sorted(lines[:2]) == others
    assert lines[2:] == last
    assert outcome.seconds < TIMEOUT_S


@pytest.mark.parametrize(
    ("rank", "fault", "message"),
    [
        (1, "saving", r"checkpoints/step-4: cannot be written by rank 1 on host \S+ \(disk full\); free space or"),
        (0, "metrics", r"^distmoe: error: planted: no space$"),
        (-1, "data", r"^distmoe: error: the planted file is damaged$"),
    ],
    ids=["one of all while saving", "what rank 0 does for all", "all at once"],
)
def test_error_that_all_know_of_is_printed_once(rank: int, fault: str, message: str, data: Path, tmp_path: Path):
    outcome = run_with_fault(2, tmp_path, data, (rank, fault), *OVERRIDES)
    assert outcome.codes == [2, 2], outcome.log
    assert re.search(message, the_error(outcome))
    # Nothing half-written is taken for a checkpoint.
    assert checkpoint_steps(folder_of(tiny_config(data, tmp_path / "runs"))) == []


@pytest.mark.parametrize(
    ("fault", "lost"),
    [("killed", 1), ("killed", 0), ("stopped", 2), ("stopped saving", 1)],
    ids=["killed", "rank 0 killed", "stopped while others are in an exchange", "stopped while others only wait"],
)
def test_lost_rank_is_named_by_the_lowest_survivor(fault: str, lost: int, data: Path, tmp_path: Path):
    outcome = run_with_fault(3, tmp_path, data, (lost, fault), *OVERRIDES, stopped=lost if "stopped" in fault else -1)
    codes: list[int | None] = [1, 1, 1]
    codes[lost] = -signal.SIGKILL
    assert outcome.codes == codes, outcome.log
    lowest, other = sorted({0, 1, 2} - {lost})
    short, long = said(outcome)
    assert short == f"distmoe: rank {other} stopped: no answer from rank {lost}"
    assert re.fullmatch(
        rf"distmoe: error: rank {lost} \(host \S+\) has not been heard of for \d+ s; its last sign of life was in: "
        r"[a-z].*\. Its process has been killed .*; go on with run\.resume=true",
        long,
    )
    assert lowest < other
    assert outcome.seconds < TIMEOUT_S


def test_interrupt_of_one_rank_stops_all_after_the_same_step(data: Path, tmp_path: Path):
    outcome = run_with_fault(3, tmp_path, data, (1, "interrupted"), *OVERRIDES)
    assert outcome.codes == [130] * 3, outcome.log
    assert checkpoint_steps(folder_of(tiny_config(data, tmp_path / "runs"))) == [STEP]
    assert re.search(rf"saved \S+/step-{STEP}; go on with run\.resume=true$", outcome.log[-1])
    assert [line for line in outcome.log if "SIGINT" in line] == [
        line for line in outcome.log if line.endswith("(Ctrl-C to stop at once)")
    ]


def test_interrupt_before_there_is_anything_to_save_stops_all(data: Path, tmp_path: Path):
    outcome = run_with_fault(2, tmp_path, data, (0, "interrupted early"), *OVERRIDES, "run.resume=true")
    assert outcome.codes == [130] * 2, outcome.log
    stopped = "distmoe: rank 1 stopped: rank 0 failed in loading a checkpoint: stopped by SIGINT"
    assert said(outcome) == [stopped, "distmoe: stopped"]


def test_rank_that_never_comes_is_named(data: Path, tmp_path: Path):
    outcome = run_with_fault(3, tmp_path, data, (1, "not there"), *OVERRIDES, "parallel.timeout_s=2")
    assert outcome.codes == [2, 0, 2], outcome.log
    assert the_error(outcome) == (
        "distmoe: error: only 2 of 3 processes have joined within 2 s; rank 1 has not come: start all of them, each "
        "with a RANK of its own, or set parallel.timeout_s to wait longer"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.expert_parallel_size=3", "expert_parallel_size (3) must divide the number of processes (2)"),
        ("train.precision=fp16", "train.precision (fp16) needs a CUDA device"),
        ("data.path=/nowhere.npz", "/nowhere.npz"),
        ("seed=RANK", "the ranks have been started with different configurations"),
    ],
)
def test_bad_input_is_printed_by_one_of_all(override: str, message: str, data: Path, tmp_path: Path):
    outcome = run_with_fault(2, tmp_path, data, None, *OVERRIDES, override)
    assert outcome.codes == [2, 2], outcome.log
    assert message in the_error(outcome)
    assert not (tmp_path / "runs").exists()
