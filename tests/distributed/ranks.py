"""Runs a check on several real processes of this machine: gloo, a file rendezvous, no ports."""

import multiprocessing
import multiprocessing.connection
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 60.0  # a rank that waits longer than this for another one fails the test


def run_ranks(
    check: Callable[..., Any], world_size: int, folder: Path, *args: Any, limit_s: float = 300.0
) -> list[Any]:
    """What ``check(*args)`` returns on each rank, inside one process group of ``world_size`` processes.

    Args:
        check: A function at module level; what it gets and returns is pickled. It may use ``torch.distributed``.
        world_size: Number of processes.
        folder: An empty folder for the rendezvous file.
        args: Of the check.
        limit_s: Seconds after which all processes are killed and the test fails.

    Raises:
        AssertionError: A rank raised; the message is the traceback of the first one that did.
    """
    # A server that has imported torch forks the ranks: to import it takes each of them longer than most checks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distmoe.parallel.expert_parallel"])
    started = []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        entry = (theirs, check, rank, world_size, folder / "rendezvous", args)
        process = context.Process(target=_enter, args=entry, daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
    try:
        outcomes = _outcomes([connection for _, connection in started], limit_s)
    finally:
        for process, connection in started:
            connection.close()
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
    failures = sorted((outcome for outcome in outcomes if not outcome[0]), key=lambda outcome: outcome[2])
    if failures:
        raise AssertionError(f"{len(failures)} of {world_size} ranks failed; the first:\n{failures[0][1]}")
    return [result for _, result, _ in outcomes]


Outcome = tuple[bool, Any, float]  # whether it went well, the result or the traceback, when


def _outcomes(connections: list[Connection], limit_s: float) -> list[Outcome]:
    """By rank; a rank that dies without a word, or is not done in time, has failed as well."""
    outcomes: dict[int, Outcome] = {}
    waiting = {connection: rank for rank, connection in enumerate(connections)}
    deadline = _now() + limit_s
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(deadline - _now(), 0.0))
        if not ready:
            break
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            try:
                outcomes[rank] = pickle.loads(connection.recv_bytes())
            except EOFError:
                outcomes[rank] = (False, f"rank {rank} died", _now())
    late = {rank: (False, f"rank {rank} was not done after {limit_s} s", _now()) for rank in waiting.values()}
    return [(outcomes | late)[rank] for rank in range(len(connections))]


def _send(connection: Connection, outcome: Outcome) -> None:
    """By plain pickle: the connection's own keeps tensors in memory that ends with the process."""
    connection.send_bytes(pickle.dumps(outcome))


def _now() -> float:
    return time.monotonic()  # one clock for all processes of a machine


def _enter(
    connection: Connection, check: Callable[..., Any], rank: int, world_size: int, rendezvous: Path, args: Any
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
        try:
            result = check(*args)
        finally:
            dist.destroy_process_group()
        _send(connection, (True, result, _now()))
    except BaseException:
        _send(connection, (False, f"rank {rank}: {traceback.format_exc()}", _now()))
