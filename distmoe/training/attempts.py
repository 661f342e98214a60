"""The starts of a run and how they ended: whether this one is a launcher's restart, and when restarts are of no use.

``attempts.jsonl`` in a run's folder has a line for each start and a line for each end that somebody could still write.
A start without an end was killed.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distmoe.contracts import UserError
from distmoe.parallel.endings import PeerFailureError, describe_error, first_line
from distmoe.parallel.stop_signals import Interrupted

_KILLED = "ended without a word: killed, or its host was lost"


@dataclass(frozen=True)
class Attempt:
    """One start.

    Attributes:
        step: Where it began.
        launches: The launchers' processes, see :attr:`distmoe.parallel.launchers.Place.launch`.
        restart: Whether a launcher started it again, nobody else.
        failure: Why it ended; None: it was stopped by a signal, and saved.
    """

    step: int
    launches: tuple[str, ...]
    restart: bool
    failure: str | None = _KILLED


class Attempts:
    """Those of one run.

    Args:
        folder: Of the run; it need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "attempts.jsonl"
        self._begun = False

    def read(self) -> list[Attempt]:
        """In order; lines that a crash has cut off are left out."""
        attempts: list[Attempt] = []
        with contextlib.suppress(OSError):
            for line in self._path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    values = json.loads(line)
                    if "step" in values:
                        attempts.append(Attempt(values["step"], tuple(values["launches"]), bool(values["restart"])))
                    elif attempts:
                        last = attempts.pop()
                        attempts.append(Attempt(last.step, last.launches, last.restart, values["failure"]))
        return attempts

    def is_restart(self, launches: Sequence[str]) -> bool:
        """Whether one of these launchers has started this run before: a host that joins makes all start again."""
        before = {launch for attempt in self.read() for launch in attempt.launches}
        return not before.isdisjoint(launches)

    def begin(self, step: int, launches: Sequence[str], restart: bool, retries: int) -> None:
        """Notes a start.

        Args:
            step: Where it begins.
            launches: The launchers' processes.
            restart: Whether a launcher has started the run again.
            retries: How many restarts from one step are allowed.

        Raises:
            UserError: There were as many already, and each has failed without coming as far as a checkpoint.
        """
        if restart:
            self._refuse_loop(step, retries)
        self._write({"time": time.time(), "step": step, "launches": list(launches), "restart": restart})
        self._begun = True

    @contextlib.contextmanager
    def ends_noted(self, rank: int) -> Iterator[None]:
        """Inside, the error that ends this process is noted, unless it is another rank's."""
        try:
            yield
        except PeerFailureError:
            raise
        except Interrupted:
            if self._begun:
                self._write({"failure": None})
            raise
        except BaseException as error:
            if self._path.exists():  # otherwise the run has not begun; nothing is left behind
                self._write({"failure": f"rank {rank}: {first_line(describe_error(error))}"})
            raise

    def _refuse_loop(self, step: int, retries: int) -> None:
        failures: list[str] = []
        for attempt in reversed(self.read()):
            if attempt.step != step or attempt.failure is None:
                break
            failures.append(attempt.failure)
            if not attempt.restart:
                break
        if len(failures) > retries:
            raise UserError(
                f"this run has been started {len(failures)} times from step {step} and has failed each time before its "
                f"next checkpoint; the first time: {failures[-1]}. Mend that and go on with run.resume=true, or raise "
                f"run.retries ({retries})"
            )

    def _write(self, values: dict[str, Any]) -> None:
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:  # a full disk stops nothing
            file.write(json.dumps(values) + "\n")
