"""Hosts of which one was not updated: nobody trains, and one message names who runs what."""

import platform
from importlib.metadata import version
from pathlib import Path

import pytest

from distmoe.parallel.handshake import own_build
from tests.distributed.failing import OTHER_SOURCES, OTHER_TORCH, run_with_fault
from tests.runs import write_quadrants

pytestmark = pytest.mark.distributed

HOST, TORCH, SOURCES = platform.node(), version("torch"), own_build()["distmoe's code"]
# The rank that differs, in what, and what is said of it, or of those that differ from it.
CASES = {
    "a package": (1, "other torch", f"rank 1 (host {HOST}): torch {OTHER_TORCH} instead of {TORCH}"),
    "the sources of rank 0": (
        0, "other sources", f"rank 1, 2 (host {HOST}): distmoe's code {SOURCES} instead of {OTHER_SOURCES}"
    ),
    "a version that does not say": (2, "silent", "rank 2 (host unknown): another version of distmoe"),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quadrants(tmp_path_factory.mktemp("data") / "quadrants.npz")


@pytest.mark.parametrize("case", CASES)
def test_host_that_runs_something_else_ends_all_before_anything_is_written(case: str, data: Path, tmp_path: Path):
    rank, fault, difference = CASES[case]
    outcome = run_with_fault(3, tmp_path, data, (rank, fault), "parallel.timeout_s=16")
    assert outcome.codes == [2] * 3, outcome.log
    message = (
        f"hosts do not run the same as rank 0 (host {HOST}): {difference}. Bring checkout and environment of all hosts "
        "to one state (bash launch/setup.sh), then start again"
    )
    assert outcome.log[-1] == f"distmoe: error: {message}"
    # Of the others at most a line each, if they come so late that they have to be told.
    others = {f"distmoe: rank {one} stopped: rank 0 failed in start: {message}" for one in (1, 2)}
    assert set(outcome.log[:-1]) <= others
    assert not (tmp_path / "runs").exists()
