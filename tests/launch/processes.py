"""Programs that run on an imitated host, as the process sees them that started them from outside."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

COMMAND_S = 30.0  # a command that takes longer than this, unless told otherwise, hangs
EXECUTABLES = ":".join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
ENTER = Path(__file__).with_name("enter.py")


def environment(added: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with ``added`` to it, and the folder of this Python first in ``PATH``."""
    return {**os.environ, "PATH": EXECUTABLES, **(added or {})}


class Process(subprocess.Popen[str]):
    """A program on a host, in a session of its own.

    ``pid`` is that of ``enter.py``, which stays outside the host, waits for the program and ends as it does; signals
    sent through this object reach the program itself.

    Attributes:
        log: The file in which its output is, or None if it goes to pipes.
    """

    def __init__(
        self,
        host_process: int,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        log: Path | None = None,
    ) -> None:
        """Starts the program.

        Args:
            host_process: A process of the host, as seen from outside.
            command: Program and arguments.
            env: Added to this process's environment.
            cwd: Working directory on the host; None: this process's.
            log: To which output is appended; None: pipes.
        """
        self.log = log
        self._log_start = log.stat().st_size if log is not None and log.exists() else 0
        with contextlib.ExitStack() as stack:
            output = subprocess.PIPE if log is None else stack.enter_context(log.open("ab"))
            reader, writer = os.pipe()
            report = stack.enter_context(open(reader))
            try:
                spaces = ("--net", "--uts", "--ipc", "--pid", "--mount", "--no-fork")
                entry = (sys.executable, "-I", "-S", ENTER, str(writer), cwd or Path.cwd())
                super().__init__(
                    ["nsenter", f"--target={host_process}", *spaces, "--", *entry, *command],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.PIPE if log is None else subprocess.STDOUT,
                    env=environment(env),
                    text=True,
                    errors="replace",
                    pass_fds=[writer],
                    start_new_session=True,  # Ctrl-C is for this process
                )
            finally:
                os.close(writer)
            self._program = int(report.read() or 0)  # 0: the host has just ended

    def program_pid(self) -> int | None:
        """The program's process id as seen from outside the host, which ``os.kill`` takes; None: it has ended."""
        return self._program if self.poll() is None else None

    def send_signal(self, sig: int) -> None:
        """Sends a signal to the program alone, not to the processes that it started."""
        self._signal(os.kill, sig)

    def signal_group(self, number: int) -> None:
        """Sends a signal to the program and to all processes of its group, as a terminal does."""
        self._signal(os.killpg, number)

    def _signal(self, send: Callable[[int, int], None], number: int) -> None:
        if pid := self.program_pid():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                send(pid, number)

    def read_log(self) -> str:
        """What the program has written so far."""
        assert self.log is not None, "a program without a log"
        return self.log.read_bytes()[self._log_start :].decode(errors="replace")

    def wait_for(self, pattern: str, timeout: float = COMMAND_S) -> str:
        """Waits until the log has a match of the regular expression ``pattern`` and returns the match.

        Raises:
            AssertionError: The program ended or the time was over before; the message holds the log.
        """
        give_up = time.monotonic() + timeout
        while True:
            ended = self.poll() is not None  # asked first: what it wrote last is in the log then
            text = self.read_log()
            if match := re.search(pattern, text, re.MULTILINE):
                return match.group()
            assert not ended, f"ended with {self.returncode} before {pattern!r}:\n{text}"
            assert time.monotonic() < give_up, f"no {pattern!r} in {timeout} s:\n{text}"
            time.sleep(0.01)


def process_table(pid: int) -> str | None:
    """Identity of the process table (PID namespace) that a process is in, or None if there is no such process."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None
