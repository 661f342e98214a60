"""Runs a function on several new processes of this machine: for measurements. Training is started by a launcher."""

import multiprocessing
import multiprocessing.connection
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distmoe.contracts import UserError
from distmoe.parallel.control import Control

_TIMEOUT = timedelta(minutes=5)  # of one exchange; DeepSpeed may compile in between


def run_on_processes(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """What ``function(control, *args)`` returns on each rank, by rank.

    The processes share a gloo group of all ranks, and have one thread each. If one of them fails, all are ended.

    Args:
        function: At module level; arguments and results are pickled.
        world_size: Number of processes.
        args: Of the function, after its :class:`distmoe.parallel.control.Control`.

    Raises:
        UserError: A rank raised one.
        RuntimeError: A rank raised something else, or died; the message is its traceback.
    """
    context = multiprocessing.get_context("spawn")
    processes, ranks = [], {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                entry = (theirs, function, rank, world_size, Path(folder) / "rendezvous", args)
                process = context.Process(target=_enter, args=entry, daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                ranks[ours] = rank
            results = _results(ranks)
            for process in processes:
                process.join()
            return results
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()
            for connection in ranks:
                connection.close()


def _results(ranks: dict[Connection, int]) -> list[Any]:
    """By rank, or the first failure."""
    results: dict[int, Any] = {}
    while len(results) < len(ranks):
        waiting = [connection for connection, rank in ranks.items() if rank not in results]
        for connection in multiprocessing.connection.wait(waiting):
            assert isinstance(connection, Connection)
            rank = ranks[connection]
            try:
                error, result = connection.recv()
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
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    outcome: tuple[type[Exception] | None, Any]
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=_TIMEOUT
        )
        outcome = (None, function(Control(rank, world_size), *args))
    except UserError as error:
        outcome = (UserError, str(error))
    except BaseException:
        outcome = (RuntimeError, traceback.format_exc())
    connection.send(outcome)  # before the group goes: the others then fail because of this one, and say so later
    if dist.is_initialized():
        dist.destroy_process_group()
