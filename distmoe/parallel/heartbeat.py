"""Signs of life, and how several processes end together: the first cause is known to all, and printed last and alone.

Each rank writes where it is into the store, twice a second, from a thread of its own. A rank that fails writes the
*ending* there: once, the first one counts. The others, blocked in an exchange perhaps, see it through that thread, say
in one line that they stop, and acknowledge; then the rank that failed prints its own error and leaves, and its broken
connections wake the others up. Where nobody says why an exchange has failed, the survivors compare signs of life:
whoever gives none any more is lost. And each thread watches the next rank, in a ring: where its signs of life stop and
no exchange fails (GPUs wait on their own, and so does work outside exchanges), the thread writes the ending.

A process that cannot be woken up is ended by the thread. Nothing here waits for ever: neither for a rank nor a store.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
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
from distmoe.parallel.signs import ENDING_KEY, Sign, come_key, describe_lost, joined_key, listed, sign_key

BEAT_S = 0.5
_TELL_S = 0.4  # the thread speaks for the main thread only after so long: it may be about to fail in the same way
_REPORT_S = 5.0
_ANSWER_S = 2.0  # of the store, to one request
_SUSPECT_BEATS = 3  # of the watching rank without one of the next rank
_LEAVE_S = 4.0  # after the ending: for acknowledgements, and for a main thread to come to its end

Result = TypeVar("Result")


class Heartbeat:
    """Tells the others where this rank is, and learns when one of them has ended the run.

    Args:
        rank: This one.
        world_size: Number of ranks.
        store: Reached by all, with keys of this run alone, :func:`distmoe.parallel.signs.empty_signs` among them; used
            through clones, since a request holds a store's lock until it is answered.
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
        # Counted in own beats: where the whole host stands still, or is slow, so does the counting.
        self._still_limit = round(max(10 * BEAT_S, limit_s / 2) / BEAT_S)
        self._place = "start"
        self._alone = False
        self._waits = 0
        self._beats = 0
        self._joined = False
        self._same_rank = 0
        self._next_sign = b""
        self._still = 0
        self._suspected: dict[int, Sign] = {}
        self._told = threading.Lock()  # taken once, by whoever says that this rank stops
        self._stop = threading.Event()
        self._leaving = threading.Event()
        self._unreachable_since: float | None = None
        self._thread = threading.Thread(target=self._beat_until_stopped, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begins to write signs of life."""
        self._same_rank = self._store.add(joined_key(self.rank), 1)
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Returns when all ranks have come to this run. Collective.

        Raises:
            UserError: Some have not come in time, or two processes have one rank.
        """
        if self._same_rank > 1:
            raise UserError(
                f"two processes say that they are rank {self.rank}: give each a RANK of its own, from 0 to "
                f"{self.world_size - 1}, and each run a MASTER_PORT of its own"
            )
        all_here, started = self._come(), time.monotonic()
        while not self._store.check([all_here]):
            self._raise_ending()
            if time.monotonic() - started > timeout_s:
                missing = self._missing()
                raise UserError(
                    f"only {self.world_size - len(missing)} of {self.world_size} processes have joined within "
                    f"{timeout_s:g} s; rank {listed(missing)} has not come: start all of them, each with a RANK of "
                    "its own, or set parallel.timeout_s to wait longer"
                )
            _nap(started)
        self._joined = True

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

    @contextlib.contextmanager
    def working_alone(self) -> Iterator[None]:
        """Inside, others wait for this rank however long that takes, see :meth:`wait_for_all`."""
        self._alone = True
        try:
            yield
        finally:
            self._alone = False

    def wait_for_all(self, report: Callable[[str], None], what: str = "") -> None:
        """Returns when all ranks have come here, however long that takes, while they give signs of life. Collective.

        Args:
            report: Gets a line every few seconds.
            what: What they have done then; empty: what is noted as this rank's place. Then only ranks that note to be
                :meth:`working_alone` are waited for beyond the time limit.

        Raises:
            PeerFailureError: A rank has ended the run meanwhile.
            LostRanksError: One is elsewhere for the time limit.
        """
        all_here = self._come()
        started = looked = time.monotonic()
        while not self._store.check([all_here]):
            self._raise_ending()
            now = time.monotonic()
            if now - looked >= min(_REPORT_S, self._limit_s):
                looked, missing, signs = now, self._missing(), self._signs(self._store)
                elsewhere = [rank for rank in missing if rank not in signs or not signs[rank].alone]
                if not what and elsewhere and now - started > self._limit_s:
                    raise LostRanksError(f"rank {listed(elsewhere)} has not come for {self._limit_s:g} s")
                report(f"waiting for rank {listed(missing)}: {what or self._place} ({now - started:.0f} s)")
            _nap(started)

    def settle(self, error: BaseException) -> BaseException:
        """Agrees with the other ranks on why the run ends, and waits, for seconds at most, until they know.

        Returns:
            What is to be raised: ``error`` itself where it is this rank that prints it, otherwise one of the errors
            above.
        """
        self._leaving.set()
        try:
            ending = self.ending or _bounded(lambda: self._read(self._store), _ANSWER_S)
            if ending is None:
                proposed = self._diagnosed(error) if is_consequence(error) else self._own(error)
                ending = _bounded(lambda: self._agreed(self._store, proposed), _ANSWER_S)
            self.ending = ending
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

    def _come(self) -> str:
        """Notes that this rank has come to the next place where all wait; the key that is there when all have."""
        self._waits += 1
        self._store.set(come_key(self.rank), str(self._waits))
        if self._store.add(f"come/{self._waits}", 1) == self.world_size:
            self._store.set(f"all here/{self._waits}", "1")
            for used in ("come", "all here"):  # all have left the place before this one
                self._store.delete_key(f"{used}/{self._waits - 1}")
        return f"all here/{self._waits}"

    def _missing(self) -> list[int]:
        """The ranks that have not come to where this one waits."""
        come = self._store.multi_get([come_key(rank) for rank in range(self.world_size)])
        return [rank for rank, waits in enumerate(come) if int(waits or 0) < self._waits]

    def _raise_ending(self) -> None:
        if self.ending is not None:
            raise PeerFailureError(self.ending.cause, self.ending.exit_code)

    def _agreed(self, store: Any, proposed: Ending) -> Ending:
        return Ending.of_text(store.compare_set(ENDING_KEY, "", proposed.text()))  # the first one counts

    def _own(self, error: BaseException) -> Ending:
        message, place = describe_error(error), self._place
        return Ending(
            f"rank {self.rank} failed in {place}: {first_line(message)}", message, exit_code_of(error), self.rank
        )

    def _diagnosed(self, error: BaseException) -> Ending:
        """Who is lost: gives no signs of life any more. Where all do, who is elsewhere."""
        before = _bounded(lambda: self._signs(self._store), _ANSWER_S)
        time.sleep(self._silent_s)
        after = _bounded(lambda: self._signs(self._store), _ANSWER_S)
        lost = self._lost(before, after)
        if lost is not None:
            return lost
        places: dict[str, list[int]] = {}
        for rank, sign in after.items():
            places.setdefault(sign.place, []).append(rank)
        where = "; ".join(f"rank {listed(there)} in {place}" for place, there in places.items())
        cause = "an exchange failed although all ranks are alive"
        message = (
            f"{cause}: {where} ({first_line(str(error))}). A rank that is "
            "elsewhere than the others is too slow (raise parallel.timeout_s) or waits for something; where all "
            "are in one place, the network between them is cut, or they do not agree on the exchange: "
            "parallel.checked_exchanges=true says how"
        )
        return Ending(cause, message, LostRanksError.exit_code, 0)

    def _lost(self, before: dict[int, Sign], after: dict[int, Sign]) -> Ending | None:
        """The ending for ranks whose signs of life have not changed; None: all have."""
        ranks = range(self.world_size)
        alive = {rank for rank in ranks if rank in after and (rank not in before or after[rank] != before[rank])}
        alive.add(self.rank)
        lost = tuple(rank for rank in ranks if rank not in alive)
        if not lost:
            return None
        cause = f"no answer from rank {listed(lost)}"
        return Ending(cause, describe_lost(lost, after), LostRanksError.exit_code, min(alive), lost)

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
        while others and not self._store.check([f"told/{rank}" for rank in others]):
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

    def _signs(self, store: Any) -> dict[int, Sign]:
        signs = enumerate(store.multi_get([sign_key(rank) for rank in range(self.world_size)]))
        return {rank: Sign(**json.loads(sign)) for rank, sign in signs if sign}

    def _read(self, store: Any) -> Ending | None:
        return Ending.of_text(store.get(ENDING_KEY)) if store.check([ENDING_KEY]) else None

    def _beat_until_stopped(self) -> None:
        seen: float | None = None
        while not self._stop.is_set():
            asked = time.monotonic()
            try:
                _bounded(self._beat, self._limit_s + BEAT_S)
                self._unreachable_since = None
            except _NoAnswerError:
                self._unreachable_since = self._unreachable_since or asked
            now = time.monotonic()
            if self.ending is not None:
                seen = seen or now
                self._end_for_main_thread(self.ending, now - seen)
            elif self._unreachable_since is not None and now - self._unreachable_since > self._limit_s:
                ending = self._without_store(LostRanksError(_STORE_GONE))
                self._end_process(ending if isinstance(ending, LostRanksError) else None)
            self._stop.wait(BEAT_S if self._joined and seen is None else BEAT_S / 10)

    def _beat(self) -> bool:
        """One sign of life, and a look at what others have left in the store. True, for :func:`_bounded`."""
        self._beats += 1
        sign = Sign(self._beats, self._place, time.time(), socket.gethostname(), self._alone)
        self._thread_store.set(sign_key(self.rank), json.dumps(asdict(sign)))
        self.ending = self.ending or self._read(self._thread_store)
        if self._joined and self.ending is None and not self._leaving.is_set():
            self._watch_next(self._thread_store)
        return True

    def _watch_next(self, store: Any) -> None:
        """Writes the ending where the next rank gives no signs of life: nobody else may notice."""
        sign = store.get(sign_key((self.rank + 1) % self.world_size))
        self._still = self._still + 1 if sign == self._next_sign else 0
        self._next_sign = sign
        if self._still == _SUSPECT_BEATS:
            self._suspected = self._signs(store)
        elif self._still >= self._still_limit:
            lost = self._lost(self._suspected, self._signs(store))
            if lost is not None:
                self.ending = self._agreed(store, lost)

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


def _nap(started: float) -> None:
    """Before looking again: short at first, so that a short wait stays short."""
    time.sleep(min((time.monotonic() - started) / 4 + 1e-4, BEAT_S / 10))


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
