"""What ranks agree on, and how long work is waited for."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from distmoe.contracts import UserError
from distmoe.parallel.control import Control
from distmoe.parallel.heartbeat import Heartbeat
from distmoe.parallel.world import World
from distmoe.training.checkpoint import DamagedCheckpointError
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


def _check_waiting(folder: Path) -> list[str]:
    """Rank 1 works for longer than an exchange may take; the signs of life of both go on meanwhile."""
    rank = dist.get_rank()
    store = dist.FileStore(str(folder / "store"), 2)  # type: ignore[attr-defined]
    heartbeat = Heartbeat(rank, 2, store, World(store=store).serves_store, limit_s=1.0)
    heartbeat.start()
    heartbeat.join(timeout_s=60)
    lines: list[str] = []
    if rank == 1:
        time.sleep(6)  # a report comes after 5 s
    heartbeat.wait_for_all("compiling", lines.append)
    heartbeat.stop()
    return lines


def test_ranks_agree(tmp_path: Path):
    ours = run_ranks(_check_control, 2, tmp_path)
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
    lines, none = run_ranks(_check_waiting, 2, tmp_path, tmp_path)
    assert [line.rpartition(" (")[0] for line in lines] == ["waiting for rank 1: compiling"]
    assert none == []
