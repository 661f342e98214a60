"""Runs a check on several real processes of this machine: gloo, a file rendezvous, no ports."""

from collections.abc import Callable
from typing import Any

from distmoe.parallel.control import Control
from distmoe.parallel.spawn import run_on_processes

TIMEOUT_S = 60.0  # a rank that waits longer than this for another one fails the test


def run_ranks(check: Callable[..., Any], world_size: int, *args: Any, limit_s: float = 300.0) -> list[Any]:
    """What ``check(*args)`` returns on each rank, inside one process group of ``world_size`` processes.

    Args:
        check: A function at module level; what it gets and returns is pickled. It may use ``torch.distributed``.
        world_size: Number of processes.
        args: Of the check.
        limit_s: Seconds after which all processes are killed and the test fails.

    Raises:
        RuntimeError: A rank raised; the message is the traceback of the first one that did.
    """
    # A server that has imported torch forks the ranks: to import it takes each of them longer than most checks.
    preload = ["distmoe.parallel.expert_parallel"]
    return run_on_processes(_called, world_size, check, *args, exchange_s=TIMEOUT_S, limit_s=limit_s, preload=preload)


def _called(control: Control, check: Callable[..., Any], *args: Any) -> Any:
    del control
    return check(*args)
