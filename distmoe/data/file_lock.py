"""A lock between processes of one or several hosts, held through a file; it ends with the process that holds it."""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_REPORT_S = 5.0


@contextlib.contextmanager
def file_lock(path: Path, what: str, wait: bool = True) -> Iterator[bool]:
    """Holds the lock ``path``; waits as long as another process does, with a log line every few seconds.

    Yields whether the lock is held: always, unless ``wait`` is false and another process has it.

    The file stays behind: removing it would let two processes hold "the" lock at once.

    Args:
        path: The lock file, in a folder that exists.
        what: What the other process is making, for the log.
        wait: Whether to wait for the other process.

    Raises:
        OSError: The file cannot be made, or the file system has no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        started = reported = time.monotonic()
        first = True
        while not (held := _try_lock(descriptor)) and wait:
            now = time.monotonic()
            if first or now - reported >= _REPORT_S:
                logger.info("waiting for another process to finish %s (%.0f s, lock %s)", what, now - started, path)
                first, reported = False, now
            time.sleep(_POLL_S)
        yield held
    finally:
        os.close(descriptor)  # gives the lock back


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
