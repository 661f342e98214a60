"""The doctor after a launcher's name: all ranks agree, every host is looked at, and clocks are compared."""

import platform
import resource
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import FileStore

from distmoe import doctor
from distmoe.doctor import clocks
from distmoe.doctor.clocks import Skew, measure_ranks
from distmoe.doctor.findings import fail, ok
from distmoe.parallel.control import Control
from distmoe.parallel.world import World
from tests.distributed.ranks import run_ranks
from tests.runs import tiny_config, write_quadrants

pytestmark = pytest.mark.distributed

AHEAD_S = 7.0  # the clock of the second host


def _plant_clock(ahead_s: float) -> None:
    clocks.time = SimpleNamespace(time=lambda: time.time() + ahead_s)  # type: ignore[attr-defined]


def _check_clocks() -> list[Skew]:
    rank = dist.get_rank()
    _plant_clock(rank * AHEAD_S)
    if rank == 1:
        time.sleep(0.3)  # it comes late; that is not skew
    return measure_ranks(Control(rank, dist.get_world_size()))


def test_clocks_of_ranks_are_compared_within_their_accuracy():
    on_first, on_second, on_third = run_ranks(_check_clocks, 3)
    for skews, own in ((on_first, 0), (on_second, 1), (on_third, 2)):
        for rank, skew in enumerate(skews):
            assert skew.seconds == pytest.approx((rank - own) * AHEAD_S, abs=skew.accuracy_s)
            assert skew.accuracy_s < 0.25  # less than what the late one was late by


def _check_doctor(data: Path, folder: Path) -> tuple[bool, list[str]]:
    """Two ranks on each of two hosts; the second has few open files, a wrong clock, and a fault in its network."""
    rank, size = dist.get_rank(), dist.get_world_size()
    second, shown = rank // 2 == 1, list[str]()
    platform.node = lambda: "second" if second else "first"
    network = [fail("host name", "planted", "mend it")] if second else [ok("host name", "first")]
    doctor.examine_network = lambda several_hosts, port: network  # type: ignore[attr-defined]
    if second:
        _plant_clock(AHEAD_S)
        resource.getrlimit = lambda kind: (100, 5000)
    world = World(rank, size, rank % 2, 2, store=FileStore(str(folder / "store"), size))
    World.of_environment = staticmethod(lambda: world)  # type: ignore[assignment,method-assign]
    config = tiny_config(data, folder / "runs", "parallel.expert_parallel_size=2")
    return doctor.examine(doctor.Question(config, "prepare it"), shown.append), shown


def test_every_host_is_looked_at_and_all_ranks_agree(tmp_path: Path):
    outcomes: list[Any] = run_ranks(_check_doctor, 4, write_quadrants(tmp_path / "a.npz"), tmp_path)
    assert [well for well, _ in outcomes] == [False] * 4
    page = "\n".join(outcomes[0][1])
    assert page.startswith("machine first\n")
    assert "ok    host name         first" in page.splitlines()
    lines = page.partition("machine second\n")[2].splitlines()  # only what is not as it should be
    found = {line[:24].strip() for line in lines[: lines.index("")] if not line.startswith(" ")}
    assert found >= {"warn  open files", "fail  host name"}
    assert not any(finding.startswith("ok") for finding in found)
    (clock,) = [line for line in lines if "second against first: " in line]
    assert clock.startswith("warn  clock             second against first: +7.0 s (+-")
    start = lines.index("rank  host    device  copy  experts")
    assert [line.split() for line in lines[start + 1 : start + 5]] == [
        ["0", "first", "cpu", "0", "0-1"],
        ["1", "first", "cpu", "0", "2-3"],
        ["2", "second", "cpu", "1", "0-1"],
        ["3", "second", "cpu", "1", "2-3"],
    ]
