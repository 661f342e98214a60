"""Signs of life as they lie in the store, and what is said of ranks that give none any more."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

ENDING_KEY = "ending"


@dataclass(frozen=True)
class Sign:
    """A sign of life.

    Attributes:
        beats: Counts up.
        place: Where the rank is: ``step 12, forward``.
        time_s: When, by its host's clock.
        host: Its host's name.
        alone: Whether it works alone, which may take long: see :meth:`Heartbeat.working_alone`.
    """

    beats: int
    place: str
    time_s: float
    host: str
    alone: bool


def sign_key(rank: int) -> str:
    """Of a rank's last sign of life."""
    return f"alive/{rank}"


def joined_key(rank: int) -> str:
    """Of the number of processes that say that they are this rank."""
    return f"joined/{rank}"


def come_key(rank: int) -> str:
    """Of the number of places where a rank has come that all wait at."""
    return f"come to/{rank}"


def build_key(rank: int) -> str:
    """Of what a rank runs, see :mod:`distmoe.parallel.handshake`."""
    return f"build/{rank}"


def empty_signs(world_size: int) -> tuple[list[str], list[str]]:
    """Keys and first values, for who opens a run: several values are read in one request if all are there."""
    keys = [key(rank) for key in (sign_key, come_key, build_key) for rank in range(world_size)]
    return keys, [""] * len(keys)


def describe_lost(lost: Iterable[int], signs: Mapping[int, Sign]) -> str:
    """Which ranks are lost, and where they were."""
    found = []
    for rank in lost:
        sign = signs.get(rank)
        if sign is None:
            found.append(f"rank {rank} has never given a sign of life")
            continue
        age_s = max(time.time() - sign.time_s, 0.0)
        found.append(
            f"rank {rank} (host {sign.host}) has not been heard of for {age_s:.0f} s; its last sign of life was "
            f"in: {sign.place}"
        )
    return (
        "; ".join(found) + ". Its process has been killed (out of memory?) or stopped, or its host is cut off; go "
        "on with run.resume=true"
    )


def listed(ranks: Iterable[int]) -> str:
    """Ranks, for a message."""
    return ", ".join(str(rank) for rank in ranks)
