"""Signs of life, and how several processes end together: the first cause is known to all, and printed last and alone.

Each rank writes where it is into the store, twice a second, from a thread of its own. A rank that fails writes the
*ending* there: once, the first one counts. The others, blocked in an exchange perhaps, see it through that thread, say
in one line that they stop, and acknowledge; then the rank that failed prints its own error and leaves, and its broken
connections wake the others up. Where nobody says why an exchange has failed, the survivors compare signs of life:
whoever gives none any more is lost.

A process that cannot be woken up is ended by the thread. Nothing here waits for ever: neither for a rank nor a store.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, TypeVar

from distmoe.contracts import UserError
from distmoe.parallel.endings import (
    Ending,
    LostRanksError,
    PeerFailureError,
    describe_error,
    end_at_once,
    exit_code_of,
    first_line,
    is_consequence,
    say,
)

BEAT_S = 0.5
_TELL_S = 0.4  # the thread speaks for the main thread only after so long: it may be about to fail in the same way
_REPORT_S = 5.0
_LEAVE_S = 4.0  # after the ending: for acknowledgements, and for a main thread to come to its end

Result = TypeVar("Result")


@dataclass(frozen=True)
class Sign:
    """A sign of life.

    Attributes:
        beats: Counts up.
        place: Where the rank is: ``step 12, forward``.
        time_s: When, by its host's clock.
        host: Its host's name.
    """

    beats: int
    place: str
    time_s: float
    host: str


class Heartbeat:
    """Tells the others where this rank is, and learns when one of them has ended the run.

    Args:
        rank: This one.
        world_size: Number of ranks.
        store: Reached by all; used through clones, since a request holds a store's lock until it is answered.
        serves_store: Whether the store ends with this process, which therefore leaves last.
        limit_s: For how long ranks wait for each other at all.
    """

    def __init__(self, rank: int, world_size: int, store: Any, serves_store: bool, limit_s: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self.ending: Ending | None = None
        self.store = store
        self._store, self._thread_store = store.clone(), store.clone()
        self._serves_store = serves_store
        self._limit_s = limit_s
        # A rank without a sign of life for so long, after an exchange has failed, is lost; a busy host may be slow.
        self._silent_s = max(3 * BEAT_S, min(10 * BEAT_S, limit_s / 4))
        self._place = "start"
        self._beats = 0
        self._told = threading.Lock()  # taken once, by whoever says that this rank stops
        self._stop = threading.Event()
        self._leaving = threading.Event()
        self._unreachable_since: float | None = None
        self._thread = threading.Thread(target=self._beat_until_stopped, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begins to write signs of life."""
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Returns when all ranks have opened the store. Collective.

        Raises:
            UserError: Some have not come in time, or two processes have one rank.
        """
        if self._store.add(f"joined/{self.rank}", 1) > 1:
            raise UserError(
                f"two processes say that they are rank {self.rank}: give each a RANK of its own, from 0 to "
                f"{self.world_size - 1}, and each run a MASTER_PORT of its own"
            )
        keys = [f"joined/{rank}" for rank in range(self.world_size)]
        give_up = time.monotonic() + timeout_s
        while not self._store.check(keys):
            if self.ending is not None:
                raise PeerFailureError(self.ending.cause, self.ending.exit_code)
            if time.monotonic() > give_up:
                missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
                raise UserError(
                    f"only {self.world_size - len(missing)} of {self.world_size} processes have joined within "
                    f"{timeout_s:g} s; rank {_listed(missing)} has not come: start all of them, or set "
                    "parallel.timeout_s to wait longer"
                )
            time.sleep(BEAT_S / 10)

    def stop(self) -> None:
        """No more signs of life; the run has ended well."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=_LEAVE_S)

    def at(self, place: str) -> None:
        """Notes where this rank is; a few nanoseconds."""
        self._place = place

    @contextlib.contextmanager
    def during(self, what: str, num_bytes: int = 0) -> Iterator[None]:
        """Notes ``what`` besides the place, while it goes on; it stays noted if it fails."""
        del num_bytes
        place = self._place
        self._place = f"{place}, {what}"
        yield
        self._place = place

    def wait_for_all(self, what: str, report: Callable[[str], None]) -> None:
        """Returns when all ranks have come here, however long that takes, while they give signs of life. Collective.

        Args:
            what: What they have done then; each name once.
            report: Gets a line every few seconds.

        Raises:
            PeerFailureError: A rank has ended the run meanwhile.
            LostRanksError: One gives no sign of life for the time limit.
        """
        keys = [f"done/{what}/{rank}" for rank in range(self.world_size)]
        self._store.set(keys[self.rank], "1")
        started = looked = time.monotonic()
        heard = dict.fromkeys(range(self.world_size), (0, started))
        while not self._store.check(keys):
            now = time.monotonic()
            if self.ending is not None:
                raise PeerFailureError(self.ending.cause, self.ending.exit_code)
            if now - looked >= _REPORT_S:
                looked = now
                missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
                signs = self._signs()
                heard |= {rank: (sign.beats, now) for rank, sign in signs.items() if sign.beats != heard[rank][0]}
                silent = [rank for rank in missing if now - heard[rank][1] > max(self._limit_s, _REPORT_S)]
                if silent:
                    raise LostRanksError(_describe_lost(silent, signs))
                report(f"waiting for rank {_listed(missing)}: {what} ({now - started:.0f} s)")
            time.sleep(BEAT_S / 10)

    def settle(self, error: BaseException) -> BaseException:
        """Agrees with the other ranks on why the run ends, and waits, for seconds at most, until they know.

        Returns:
            What is to be raised: ``error`` itself where it is this rank that prints it, otherwise one of the errors
            above.
        """
        self._leaving.set()
        try:
            ending = _bounded(lambda: self._agree(error), self._silent_s + 1.0)
        except _NoAnswerError:
            return self._without_store(error)
        if ending.speaker == self.rank:
            with contextlib.suppress(_NoAnswerError):
                _bounded(lambda: self._await_acknowledgements(ending), _LEAVE_S)
            return LostRanksError(ending.message) if ending.lost or is_consequence(error) else error
        self._tell(None if describe_error(error) == ending.message else ending)
        with contextlib.suppress(_NoAnswerError):
            _bounded(lambda: self._acknowledge(self._store, wait=self._serves_store), _LEAVE_S)
        return PeerFailureError(ending.cause, ending.exit_code)

    def _agree(self, error: BaseException) -> Ending:
        ending = self.ending or self._read(self._store)
        if ending is None:
            proposed = self._diagnosed(error) if is_consequence(error) else self._own(error)
            ending = Ending.of_text(self._store.compare_set("ending", "", proposed.text()))  # the first one counts
        self.ending = ending
        return ending

    def _own(self, error: BaseException) -> Ending:
        message, place = describe_error(error), self._place
        return Ending(
            f"rank {self.rank} failed in {place}: {first_line(message)}", message, exit_code_of(error), self.rank
        )

    def _diagnosed(self, error: BaseException) -> Ending:
        """Who is lost: gives no signs of life any more. Where all do, who is elsewhere."""
        before = self._signs()
        time.sleep(self._silent_s)
        after = self._signs()
        ranks = range(self.world_size)
        alive = {rank for rank in ranks if rank in after and (rank not in before or after[rank] != before[rank])}
        alive.add(self.rank)
        lost = tuple(rank for rank in ranks if rank not in alive)
        if lost:
            message = _describe_lost(lost, after)
            cause = f"no answer from rank {_listed(lost)}"
        else:
            places: dict[str, list[int]] = {}
            for rank, sign in after.items():
                places.setdefault(sign.place, []).append(rank)
            where = "; ".join(f"rank {_listed(there)} in {place}" for place, there in places.items())
            cause = "an exchange failed although all ranks are alive"
            message = (
                f"{cause}: {where} ({first_line(str(error))}). A rank that is "
                "elsewhere than the others is too slow (raise parallel.timeout_s) or waits for something; where all "
                "are in one place, the network between them is cut"
            )
        return Ending(cause, message, LostRanksError.exit_code, min(alive), lost)

    def _without_store(self, error: BaseException) -> BaseException:
        """Nobody can be told anything any more."""
        if not is_consequence(error):
            return error
        if self.rank > 1:  # rank 1 says it whole: the store is rank 0's as a rule
            self._tell(Ending(_STORE_GONE, _STORE_GONE, LostRanksError.exit_code, 0))
            return PeerFailureError(_STORE_GONE, LostRanksError.exit_code)
        return LostRanksError(
            f"{_STORE_GONE}: the process or the host that serves it, rank 0's or the launcher's, has ended, does not "
            f"answer or is cut off; this rank was in: {self._place}. Go on with run.resume=true"
        )

    def _await_acknowledgements(self, ending: Ending) -> None:
        others = [rank for rank in range(self.world_size) if rank != self.rank and rank not in ending.lost]
        while not all(self._store.check([f"told/{rank}"]) for rank in others):
            time.sleep(BEAT_S / 10)
        self._store.set("all told", "1")

    def _acknowledge(self, store: Any, wait: bool = False) -> None:
        store.set(f"told/{self.rank}", "1")
        while wait and not store.check(["all told"]):
            time.sleep(BEAT_S / 10)

    def _tell(self, ending: Ending | None) -> None:
        """One line, once; None: nothing need be said."""
        if self._told.acquire(blocking=False) and ending is not None:
            say(f"distmoe: rank {self.rank} stopped: {ending.cause}")

    def _signs(self) -> dict[int, Sign]:
        keys = {rank: f"alive/{rank}" for rank in range(self.world_size)}
        there = [rank for rank, key in keys.items() if self._store.check([key])]
        return {rank: Sign(**json.loads(self._store.get(keys[rank]))) for rank in there}

    def _read(self, store: Any) -> Ending | None:
        return Ending.of_text(store.get("ending")) if store.check(["ending"]) else None

    def _beat_until_stopped(self) -> None:
        seen: float | None = None
        while not self._stop.is_set():
            try:
                self._beats += 1
                sign = Sign(self._beats, self._place, time.time(), socket.gethostname())
                self._thread_store.set(f"alive/{self.rank}", json.dumps(asdict(sign)))
                self.ending = self.ending or self._read(self._thread_store)
                self._unreachable_since = None
            except RuntimeError:
                self._unreachable_since = self._unreachable_since or time.monotonic()
            now = time.monotonic()
            if self.ending is not None:
                seen = seen or now
                self._end_for_main_thread(self.ending, now - seen)
            elif self._unreachable_since is not None and now - self._unreachable_since > self._limit_s:
                self._end_process(LostRanksError(_STORE_GONE))
            self._stop.wait(BEAT_S if seen is None else BEAT_S / 5)

    def _end_for_main_thread(self, ending: Ending, since_s: float) -> None:
        """What the main thread would do if it were not blocked, or busy."""
        if self._stop.is_set() or self._leaving.is_set():
            return
        if ending.speaker != self.rank and since_s > _TELL_S and not self._told.locked():
            self._tell(ending)
            with contextlib.suppress(RuntimeError):
                self._acknowledge(self._thread_store)
        if since_s > _LEAVE_S:
            speaks = ending.speaker == self.rank
            self._end_process(LostRanksError(ending.message) if speaks else None, ending.exit_code)

    def _end_process(self, error: LostRanksError | None, exit_code: int = LostRanksError.exit_code) -> NoReturn:
        if error is not None:
            say(f"distmoe: error: {error}")
        end_at_once(exit_code)


_STORE_GONE = "the store through which ranks find each other cannot be reached"


class _NoAnswerError(Exception):
    """The store has not answered in time, or not at all."""


def _bounded(function: Callable[[], Result], limit_s: float) -> Result:
    """What ``function`` gives, in a thread: a request to a store that is stopped never returns."""
    results: list[Result] = []

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # dist.DistError is one
            results.append(function())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if not results:
        raise _NoAnswerError
    return results[0]


def _describe_lost(lost: Iterable[int], signs: dict[int, Sign]) -> str:
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


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(str(rank) for rank in ranks)
