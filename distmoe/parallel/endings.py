"""What ends a run of several processes: the errors, and the record of the first one that all ranks read."""

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import NoReturn

from distmoe.contracts import UserError


class PeerFailureError(Exception):
    """Another rank has ended the run; this one has said so, and what there is to say is printed elsewhere.

    Attributes:
        exit_code: Of all ranks.
    """

    def __init__(self, cause: str, exit_code: int) -> None:
        super().__init__(cause)
        self.exit_code = exit_code


class LostRanksError(Exception):
    """An exchange failed because ranks are gone or do not answer; the message says which, and where they were."""

    exit_code = 1


@dataclass(frozen=True)
class Ending:
    """What ended the run.

    Attributes:
        cause: One line: which rank failed where, or which are lost.
        message: The error; the cause again where ranks are lost.
        exit_code: Of all ranks.
        speaker: The rank that prints it whole, last.
        lost: Ranks that nobody waits for.
    """

    cause: str
    message: str
    exit_code: int
    speaker: int
    lost: tuple[int, ...] = ()

    @staticmethod
    def of_text(text: bytes) -> "Ending":
        """The inverse of :meth:`text`."""
        values = json.loads(text)
        return Ending(**{**values, "lost": tuple(values["lost"])})

    def text(self) -> str:
        """For the store."""
        return json.dumps(asdict(self))


def say(line: str) -> None:
    """A line on standard error in one piece, among those of other processes."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def end_at_once(exit_code: int) -> NoReturn:
    """Ends this process without the usual closing, which would wait for broken connections."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


@contextmanager
def deaf_to_sigterm() -> Iterator[None]:
    """Inside, SIGTERM is ignored: a launcher that sees one rank leave sends it to others, which have still to speak."""
    try:
        previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except ValueError:  # not in the main thread: signals are somebody else's business
        yield
        return
    try:
        yield
    finally:
        if previous is not None:  # None: it was not set from Python, and cannot be put back
            signal.signal(signal.SIGTERM, previous)


_EXCHANGE = re.compile(r"gloo|closed by peer|reset by peer|Timed out waiting|NCCL|Broken pipe", re.IGNORECASE)


def is_consequence(error: BaseException) -> bool:
    """Whether it says only that an exchange with other ranks has failed."""
    if isinstance(error, LostRanksError | PeerFailureError):
        return True
    named = type(error).__module__.startswith("torch.distributed") or type(error).__name__.startswith("Dist")
    return isinstance(error, RuntimeError) and (named or bool(_EXCHANGE.search(str(error))))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller model or batch would have fitted; torch raises a plain RuntimeError on a CPU."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def describe_error(error: BaseException) -> str:
    """Its message, as other ranks are told it."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "stopped by SIGINT"
    if isinstance(error, SystemExit):
        return f"stopped (exit code {error.code})"
    return f"{type(error).__name__}: {error}"


def exit_code_of(error: BaseException) -> int:
    """What the command line makes of it, on all ranks: 1 our defect, 2 the user can mend it, 130 and 143 stopped."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, PeerFailureError):
        return error.exit_code
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 2 if isinstance(error, UserError) or is_out_of_memory(error) else 1


def first_line(text: str) -> str:
    """Of a message."""
    return text.splitlines()[0] if text else text
