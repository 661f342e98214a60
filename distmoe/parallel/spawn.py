"""Runs a function on several new processes of this machine, for measurements and tests; launchers start training."""

import multiprocessing
import multiprocessing.connection
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distmoe.contracts import UserError
from distmoe.parallel.control import Control

_CLOSING_S = 30.0  # for a process that has given its result to end


def run_on_processes(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    exchange_s: float = 300.0,
    limit_s: float | None = None,
    preload: Sequence[str] = (),
) -> list[Any]:
    """What ``function(control, *args)`` returns on each rank, by rank.

    The processes share a gloo group of all ranks, and have one thread each. If one of them fails, all are ended.

    Args:
        function: At module level; arguments and results are pickled.
        world_size: Number of processes.
        args: Of the function, after its :class:`distmoe.parallel.control.Control`.
        exchange_s: Seconds after which a rank that waits for another one fails.
        limit_s: Seconds after which all are ended; None: never.
        preload: Modules that a server imports once, from which the processes are forked: they start faster, and see
            the environment as it was when the first of them was started.

    Raises:
        UserError: A rank raised one.
        RuntimeError: A rank raised something else, or died, or was not done in time; the message is its traceback.
    """
    context: Any = multiprocessing.get_context("forkserver" if preload else "spawn")
    if preload:
        context.set_forkserver_preload(list(preload))
    processes, ranks = [], {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                entry = (theirs, function, rank, world_size, Path(folder) / "rendezvous", exchange_s, args)
                process = context.Process(target=_enter, args=entry, daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                ranks[ours] = rank
            results = _results(ranks, limit_s)
            for process in processes:
                process.join(timeout=_CLOSING_S)
            return results
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()
            for connection in ranks:
                connection.close()


def _results(ranks: dict[Connection, int], limit_s: float | None) -> list[Any]:
    """By rank, or the first failure."""
    give_up = None if limit_s is None else time.monotonic() + limit_s
    results: dict[int, Any] = {}
    while len(results) < len(ranks):
        waiting = [connection for connection, rank in ranks.items() if rank not in results]
        left_s = None if give_up is None else max(give_up - time.monotonic(), 0.0)
        ready = multiprocessing.connection.wait(waiting, left_s)
        if not ready:
            raise RuntimeError(f"ranks {[ranks[connection] for connection in waiting]} were not done after {limit_s} s")
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = ranks[connection]
            try:
                # By plain pickle: the connection's own keeps tensors in memory that ends with the process.
                error, result = pickle.loads(connection.recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} died") from None
            if error is not None:
                raise error(f"rank {rank}: {result}")
            results[rank] = result
    return [results[rank] for rank in range(len(ranks))]


def _enter(
    connection: Connection,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    rendezvous: Path,
    exchange_s: float,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    outcome: tuple[type[Exception] | None, Any]
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=exchange_s),
        )
        outcome = (None, function(Control(rank, world_size), *args))
    except UserError as error:
        outcome = (UserError, str(error))
    except BaseException:
        outcome = (RuntimeError, traceback.format_exc())
    connection.send_bytes(
        pickle.dumps(outcome)
    )  # before the group goes: the others then fail because of this one, and say so later
    if dist.is_initialized():
        dist.destroy_process_group()
