"""The starts of a run and how they ended: whether this one is a launcher's restart, and when restarts are of no use.

``attempts.jsonl`` in a run's folder has a line for each start and a line for each end that somebody could still write.
A start without an end was killed.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distmoe.contracts import UserError
from distmoe.parallel.control import Control
from distmoe.parallel.endings import PeerFailureError, describe_error, first_line
from distmoe.parallel.launchers import JOB
from distmoe.parallel.stop_signals import Interrupted

_KILLED = "ended without a word: killed, or its host was lost"


@dataclass(frozen=True)
class Attempt:
    """One start.

    Attributes:
        step: Where it began.
        launches: The launchers' processes, see :attr:`distmoe.parallel.launchers.Place.launch`.
        restart: Whether a launcher started it again, nobody else.
        failure: Why it ended; None: it came to its end, or was stopped by a signal and saved.
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
            for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    values = json.loads(line)
                    if "step" in values:
                        attempts.append(Attempt(values["step"], tuple(values["launches"]), bool(values["restart"])))
                    elif attempts and attempts[-1].failure == _KILLED:  # of several ranks the first has the cause
                        attempts[-1] = replace(attempts[-1], failure=values["failure"])
        return attempts

    def is_restart(self, restarts: int, launches: Sequence[str]) -> bool:
        """Whether a launcher starts this run again, and not over a folder that another one has used.

        Args:
            restarts: How often the launcher says that it has; it does not count those because of a host that joins.
            launches: The launchers' processes and jobs; empty: of a launcher that is known by its count alone.
        """
        before = {launch for attempt in self.read() for launch in attempt.launches}
        # A job may well train several runs, one after the other; only its own restart makes it the same start.
        same = [launch for launch in launches if restarts > 0 or not launch.startswith(JOB)]
        return not before.isdisjoint(same) if launches else restarts > 0

    def begin(self, control: Control, step: int, launches: Sequence[str], restart: bool, retries: int) -> None:
        """Notes a start, once: where the run has no folder yet, it is to be called again. Collective.

        Args:
            control: Of all ranks; rank 0 writes.
            step: Where it begins.
            launches: The launchers' processes.
            restart: Whether a launcher has started the run again.
            retries: How many restarts from one step are allowed.

        Raises:
            UserError: There were as many already, and each has failed without coming as far as a checkpoint.
        """

        def note() -> bool:
            if restart:
                self._refuse_loop(step, retries)
            self._write({"time": time.time(), "step": step, "launches": list(launches), "restart": restart})
            return self._path.exists()

        self._begun = self._begun or control.on_main(note)

    @contextlib.contextmanager
    def ends_noted(self, rank: int) -> Iterator[None]:
        """Inside, how the attempt that has begun ends is noted: by the rank whose error it is, or by rank 0."""
        failure: str | None = None
        says = rank == 0
        try:
            yield
        except PeerFailureError:
            says = False
            raise
        except Interrupted:
            raise
        except BaseException as error:
            failure, says = f"rank {rank}: {first_line(describe_error(error))}", True
            raise
        finally:
            if says and self._begun:  # otherwise the folder is another attempt's, which may be running
                self._write({"failure": failure})

    def _refuse_loop(self, step: int, retries: int) -> None:
        failures: list[str] = []
        for attempt in reversed(self.read()):
            if attempt.step != step or attempt.failure is None:
                break
            failures.append(attempt.failure)
            if not attempt.restart:
                break
        if len(failures) > retries:
            times = "once" if len(failures) == 1 else f"{len(failures)} times"
            raise UserError(
                f"this run has failed {times} from step {step}, without coming to its next checkpoint; the first time: "
                f"{failures[-1]}. Mend that and go on with run.resume=true, or raise run.retries ({retries})"
            )

    def _write(self, values: dict[str, Any]) -> None:
        with contextlib.suppress(OSError), self._path.open("ab+") as file:  # a full disk stops nothing
            file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
            cut_off = file.read() not in (b"", b"\n")  # what a full disk or a lost host has left
            file.write((b"\n" if cut_off else b"") + json.dumps(values).encode() + b"\n")
