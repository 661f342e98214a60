"""What ranks agree on, and how long work is waited for."""

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distmoe.contracts import UserError
from distmoe.parallel import runtime
from distmoe.parallel.control import Control
from distmoe.parallel.endings import LostRanksError, PeerFailureError
from distmoe.parallel.heartbeat import Heartbeat
from distmoe.parallel.joining import join_run
from distmoe.parallel.world import World
from distmoe.training.integrity import DamagedCheckpointError
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed


def _fails(message: str, kind: type[UserError] = UserError) -> Any:
    raise kind(message)


def _error_of(function: Any) -> str:
    try:
        function()
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def _check_control() -> dict[str, Any]:
    rank = dist.get_rank()
    control = Control(rank, dist.get_world_size())
    return {
        "on_main": control.on_main(lambda: f"of {rank}"),
        "together": control.together(lambda: f"of {rank}"),
        "gather": control.gather(rank * 10),
        "largest": control.largest([rank, -rank, math.nan if rank == 1 else 0.0, -math.inf]),
        "equal": (control.equal(7.0), control.equal(rank)),
        "on_main fails": _error_of(lambda: control.on_main(lambda: _fails(f"on {rank}", DamagedCheckpointError))),
        "together fails": _error_of(lambda: control.together(lambda: _fails(f"on {rank}") if rank > 0 else None)),
        "goes on": control.gather(rank),
    }


LIMIT_S = 1.0  # of an exchange, and of everything else that ranks wait for


def _open(folder: Path) -> tuple[Control, Heartbeat]:
    """Of a run of two ranks with very little patience."""
    rank = dist.get_rank()
    store = dist.FileStore(str(folder / "store"), 2)  # type: ignore[attr-defined]
    heartbeat = join_run(World(rank, 2, rank, 2, store=store), 60.0, LIMIT_S)
    heartbeat.join(timeout_s=60.0)
    return Control(rank, 2, dist.new_group(timeout=timedelta(seconds=LIMIT_S)), heartbeat), heartbeat


def _check_waiting(folder: Path) -> tuple[list[str], list[int], list[str]]:
    """Rank 1 works for longer than an exchange may take; the signs of life of both go on meanwhile."""
    control, heartbeat = _open(folder)
    lines: list[str] = []
    if control.rank == 1:
        time.sleep(1.8 * LIMIT_S)  # a report comes after LIMIT_S
    heartbeat.wait_for_all(lines.append, "compiling")

    def work(rank: int) -> int:
        if control.rank == rank:
            time.sleep(2 * LIMIT_S)
        return control.rank * 10

    found = [control.together(lambda: work(1)), control.on_main(lambda: work(0))]
    keys = [f"{name}/{number}" for name in ("come", "all here") for number in range(10)]
    control.wait()
    left = [key for key in keys if heartbeat.store.check([key])]
    control.wait()
    heartbeat.stop()
    return lines, found, left


def _check_elsewhere(folder: Path) -> str:
    """Rank 1 does not come to where rank 0 waits, and does not say that it works."""
    control, heartbeat = _open(folder)
    heartbeat.at(f"step {control.rank}")
    try:
        if control.rank == 0:
            control.together(lambda: None)
        while heartbeat.ending is None:
            time.sleep(0.05)
        raise PeerFailureError("the other one has said why", 1)
    except (LostRanksError, PeerFailureError) as error:
        told = heartbeat.settle(error)
    heartbeat.stop()
    return f"{type(told).__name__}: {told}"


def _check_devices() -> list[str]:
    rank = dist.get_rank()
    control, device, errors = Control(rank, 2), torch.device("cuda", 0), []
    for visible in (str(rank), "0"):
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
        gpu = SimpleNamespace(uuid=f"GPU-{visible}")
        torch.cuda.get_device_properties = lambda device, gpu=gpu: gpu
        world = World(rank, 2, rank, 2)
        errors.append(_error_of(lambda world=world: runtime._check_own_device(world, device, control)))
    other_host = World(rank, 2, 0, 1)
    errors.append(_error_of(lambda: runtime._check_own_device(other_host, device, control)))
    return errors


def test_ranks_agree():
    ours = run_ranks(_check_control, 2)
    for rank, found in enumerate(ours):
        assert found["together"] == f"of {rank}"
        assert found["on_main"] == "of 0"
        assert found["gather"] == [0, 10]
        assert found["largest"] == [1.0, 0.0, math.inf, -math.inf]
        assert found["equal"] == (True, False)
        assert found["on_main fails"] == "DamagedCheckpointError: on 0"
        assert found["together fails"] == "UserError: on 1"
        assert found["goes on"] == [0, 1]


def test_long_work_of_one_rank_is_waited_for_with_a_report(tmp_path: Path):
    (lines, *found), (none, *other) = run_ranks(_check_waiting, 2, tmp_path)
    assert [line.rpartition(" (")[0] for line in lines] == ["waiting for rank 1: compiling"]
    assert none == []
    # Of the waiting itself (the fourth: all have joined before) the store keeps only the last.
    assert [found, other] == [[[0, 0], ["come/4", "all here/4"]], [[10, 0], ["come/4", "all here/4"]]]


def test_rank_that_is_elsewhere_is_not_waited_for(tmp_path: Path):
    ours, other = run_ranks(_check_elsewhere, 2, tmp_path)
    assert ours.startswith(
        "LostRanksError: an exchange failed although all ranks are alive: rank 0 in step 0; rank 1 in step 1 "
        "(rank 1 has not come for 1 s). "
    )
    assert other == "PeerFailureError: an exchange failed although all ranks are alive"


def test_two_ranks_of_a_host_must_not_have_one_gpu():
    refused = (
        "UserError: ranks 0, 1 have been given one GPU (CUDA_VISIBLE_DEVICES=0): give each process one of its own, or "
        "each all of them"
    )
    assert run_ranks(_check_devices, 2) == [["none", refused, "none"]] * 2


def _joined(store: Any, ranks: list[int], size: int, delay_s: float = 0.0) -> list[Heartbeat | str]:
    """What processes get that come one after the other, in this order: their signs of life, or an error.

    As in a run, the signs go on until all have come; then they stop.
    """
    heartbeats: list[Heartbeat] = []

    def come(place: int) -> Heartbeat | str:
        time.sleep(place * delay_s)
        rank = ranks[place]
        try:
            heartbeats.append(heartbeat := join_run(World(rank, size, rank, size, store=store), 3.0, 3.0))
            heartbeat.join(3.0)
        except UserError as error:
            return str(error)
        return heartbeat

    with ThreadPoolExecutor(len(ranks)) as threads:
        found = list(threads.map(come, range(len(ranks))))
    for heartbeat in heartbeats:
        heartbeat.stop()
    return found


def test_ranks_of_a_restarted_run_meet_whatever_has_become_of_them_before():
    store = dist.HashStore()  # type: ignore[attr-defined]
    # Rank 1 has died before it came; rank 0 has said so, for all to read.
    (alone,) = _joined(store, [0], 2)
    assert str(alone).startswith("only 1 of 2 processes have joined within 3 s; rank 1 has not come: ")
    for order in ([1, 0], [0, 1], [1, 0]):
        first, second = _joined(store, order, 2, delay_s=0.3)
        assert isinstance(first, Heartbeat)
        assert isinstance(second, Heartbeat)
        first.store.set("theirs", str(order))
        assert second.store.get("theirs") == str(order).encode()


def test_run_that_a_rank_has_left_with_an_error_is_not_its_next_one():
    store = dist.HashStore()  # type: ignore[attr-defined]
    rank_0 = join_run(World(0, 2, 0, 2, store=store), 3.0, 3.0)
    rank_1 = join_run(World(1, 2, 1, 2, store=store), 3.0, 3.0)
    rank_1.stop()
    told = UserError("planted")
    assert rank_1.settle(told) is told
    assert type(rank_0.settle(told)) is PeerFailureError  # it knows why now, but still gives signs of life
    with pytest.raises(UserError, match="rank 1: rank 0 has not come within 1 s"):
        join_run(World(1, 2, 1, 2, store=store), 1.0, 3.0)
    rank_0.stop()


def test_two_processes_with_one_rank_are_told():
    store = dist.HashStore()  # type: ignore[attr-defined]
    errors = [found for found in _joined(store, [0, 1, 1], 2) if isinstance(found, str)]
    assert errors == [
        "two processes say that they are rank 1: give each a RANK of its own, from 0 to 1, and each run a MASTER_PORT "
        "of its own"
    ]
