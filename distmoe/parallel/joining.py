"""How the processes of a run find each other, in a store that may have seen other runs.

A store outlives a run: where one process makes several, or a launcher starts all processes again after one has died,
perhaps before it has ever come here. Each run has keys of its own, and rank 0 says which. What it said last may be of a
run that is over, or be said again in a moment; so the others wait for its signs of life, which only go on in a run that
is there. Nobody counts attempts: the launchers of several hosts may count differently.
"""

import time
from typing import Any

import torch.distributed as dist

from distmoe.contracts import UserError
from distmoe.parallel.heartbeat import BEAT_S, Heartbeat
from distmoe.parallel.signs import ENDING_KEY, empty_signs, joined_key, sign_key
from distmoe.parallel.world import World

_RUN_KEY = "distmoe run"


def join_run(world: World, timeout_s: float, limit_s: float) -> Heartbeat:
    """The signs of life of the run that rank 0 has opened; this rank's go on until they are stopped.

    Args:
        world: Several processes.
        timeout_s: Seconds after which a rank that does not find rank 0 gives up.
        limit_s: See :class:`distmoe.parallel.heartbeat.Heartbeat`.

    Raises:
        UserError: There is no store, or no rank 0.
    """
    store = world.open_store(timeout_s)
    own = _open_run(store, world.size) if world.rank == 0 else _await_run(store, world.rank, timeout_s)
    heartbeat = Heartbeat(world.rank, world.size, own, world.serves_store, limit_s)
    heartbeat.start()
    return heartbeat


def _open_run(store: Any, world_size: int) -> Any:
    name = f"distmoe run {store.add('distmoe runs', 1)}"
    own = _keys_of(store, name)
    own.multi_set(*empty_signs(world_size))
    store.set(_RUN_KEY, name)
    return own


def _await_run(store: Any, rank: int, timeout_s: float) -> Any:
    first_signs: dict[str, bytes] = {}  # by run: the one named may be of the past
    give_up = time.monotonic() + timeout_s
    while time.monotonic() < give_up:
        if store.check([_RUN_KEY]):
            name = store.get(_RUN_KEY).decode()
            own = _keys_of(store, name)
            sign = own.get(sign_key(0))
            # A run of this rank's own that has failed goes on for seconds, until rank 0 has told all.
            left = own.check([ENDING_KEY]) and own.check([joined_key(rank)])
            if sign != first_signs.setdefault(name, sign) and not left:
                return own
        time.sleep(BEAT_S / 20)
    raise UserError(
        f"rank {rank}: rank 0 has not come within {timeout_s:g} s: start all processes, or set parallel.timeout_s to "
        "wait longer"
    )


def _keys_of(store: Any, name: str) -> Any:
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]
