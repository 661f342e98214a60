import os
import time

import pytest

from distmoe.bench.scaling import measure_points, predicted, summarize
from distmoe.bench.scaling_candidates import Point
from distmoe.bench.scaling_table import DEEPSPEED, OURS
from distmoe.contracts import UserError
from distmoe.parallel.control import Control
from distmoe.parallel.spawn import run_on_processes

POINT = Point(width=16, hidden=8, num_experts=4, k=2, num_tokens=192, world_size=4, expert_parallel_size=2)


def test_both_layers_agree_and_what_they_exchange_is_counted(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    # Two replicas of the experts, so that gradients are summed as well; the layers raise where they differ.
    results = run_on_processes(measure_points, 4, [POINT], 6)
    ours, theirs = summarize(POINT, {name: [rank[0][1][name] for rank in results] for name in (OURS, DEEPSPEED)})
    # 48 tokens a rank; 40 have an expert on the other rank, 48 assignments go there. Each pair of these a row there and
    # back, forward and backward; each assignment a place (4 bytes), a weight, and its gradient.
    assert ours.sent_bytes == 4 * (4 * 40 * 16 * 4 + 3 * 48 * 4)
    assert theirs.sent_bytes == 4 * (4 * 48 * 16 * 4)  # a row for each assignment
    experts = 2 * (16 * 8 + 8 + 8 * 16 + 16)
    assert ours.expert_bytes == theirs.expert_bytes == 2 * 4 * experts
    assert ours.peak_bytes > ours.expert_bytes
    assert 0 < ours.exchange_share.median < 1
    assert 0 < theirs.exchange_share.median < 1
    machines = [rank[0][0] for rank in results]
    assert len({(machine.flops, machine.inside.bandwidth) for machine in machines}) == 1  # agreed upon
    assert predicted(POINT, machines[0]).step_s > 0


def numbered(control: Control, start: int) -> int:
    control.wait()
    return start + control.rank


def failing(control: Control, how: str) -> None:
    if control.rank == 1:
        if how == "user":
            raise UserError("no such thing")
        if how == "defect":
            raise KeyError("lost")
        os._exit(7)
    control.wait()  # for ever, or until the connection closes
    time.sleep(600)


def test_results_come_by_rank():
    assert run_on_processes(numbered, 2, 5) == [5, 6]


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("user", UserError, "^rank 1: no such thing$"),
        ("defect", RuntimeError, r"^rank 1: Traceback(.|\n)*KeyError: 'lost'"),
        ("death", RuntimeError, "^rank "),  # 1 died, or 0 saw its connection close
    ],
)
def test_a_failure_ends_all_ranks(how: str, error: type[Exception], message: str):
    start = time.monotonic()
    with pytest.raises(error, match=message):
        run_on_processes(failing, 2, how)
    assert time.monotonic() - start < 120
