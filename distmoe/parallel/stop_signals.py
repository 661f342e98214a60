"""Signals that ask a run to save and stop: Ctrl-C, a launcher's SIGTERM, Slurm's warning that the time is nearly up."""

import ctypes
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from distmoe.parallel.launchers import started_by_launcher

logger = logging.getLogger(__name__)

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_ECHO_S = 2.0  # launchers pass on a signal that the terminal has sent to all processes already
_PR_SET_PDEATHSIG = 1


class Interrupted(Exception):  # noqa: N818 - not an error
    """The run was asked to stop by a signal, and has saved; on all ranks alike.

    Attributes:
        signal_number: SIGINT, SIGTERM or SIGUSR1.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class StopSignals:
    """What has come, for the loop to act on at the end of a step.

    Inside :meth:`saving` the first SIGINT, SIGTERM or SIGUSR1 is only recorded. A second SIGINT, and any signal
    outside, ends the process at once: ``KeyboardInterrupt`` or ``SystemExit`` with code 128 + its number. Others after
    the first are a launcher's, which passes on what it gets and ends those that are left: they change nothing.

    Attributes:
        number: Of the signal that asked this rank to save and stop, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._since_s = 0.0
        self._saves = False

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Inside, somebody acts on :attr:`number`."""
        self._saves = True
        try:
            yield
        finally:
            self._saves = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Inside, signals come here; in another thread than the main one they are somebody else's business."""
        try:
            previous = {number: signal.signal(number, self._record) for number in _STOPS}
        except ValueError:
            previous = {}
        try:
            yield
        finally:
            for number, handler in previous.items():
                if handler is not None:  # None: it was not set from Python, and cannot be put back
                    signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self._saves:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        if self.number is None:
            self.number, self._since_s = number, time.monotonic()
            logger.warning("%s: saving after this step, then stopping (Ctrl-C to stop at once)", _name(number))
        elif number == signal.SIGINT and not self._is_echo():
            raise KeyboardInterrupt

    def _is_echo(self) -> bool:
        return started_by_launcher(os.environ) and time.monotonic() - self._since_s < _ECHO_S


def stop_with_launcher() -> None:
    """From now on the end of the launcher's process is a SIGTERM here: nobody is left to stop, restart or count us.

    Otherwise a rank whose torchrun has been killed goes on training, and so do those of other hosts. Linux means the
    thread that has started this process: where that is not known to last, as in srun, this is not to be called.
    """
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended just before
        os.kill(os.getpid(), signal.SIGTERM)


def _name(number: int) -> str:
    return signal.Signals(number).name
