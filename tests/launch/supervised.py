"""A training under ``launch/torchrun.sh`` and what a scheduler does for it: launchers that have ended start again.

It runs on this machine or on imitated hosts, and is watched from outside: through its log, its folder and the table of
processes. All its processes have the path of its configuration in their command lines.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from distmoe.training.run_folder import RunFolder
from tests.conftest import REPOSITORY
from tests.launch.hosts import Host
from tests.launch.processes import Process, environment

RESTARTS = 10_000  # more than any campaign needs: when a launcher gives up is tested elsewhere
RECOVERY_S = 300.0  # no start takes so long, however busy the machine
POLL_S = 0.02

STEP = re.compile(r"INFO step (\d+)/\d+, loss")
START = re.compile(r"INFO resuming \S+ from step (\d+) of|INFO no whole checkpoint in \S+: starting at step 0")
PROGRESS = re.compile(r"\d\d:\d\d:\d\d INFO |torchrun: ")


class Launcher:
    """One host's torchrun.

    Attributes:
        host: None: this machine.
    """

    def __init__(self, host: Host | None, options: Sequence[str], config: Path, log: Path) -> None:
        self.host = host
        self._command = ["bash", "launch/torchrun.sh", *options, str(config)]
        self._log = log
        self._process: subprocess.Popen[str] | subprocess.Popen[bytes] | None = None

    def start(self, *overrides: str) -> None:
        """Starts it, in a session of its own."""
        command = [*self._command, *overrides]
        settings = {"OMP_NUM_THREADS": "1"}
        if self.host is not None:
            self._process = self.host.popen(command, log=self._log, env=settings, cwd=REPOSITORY)
            return
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=environment(settings),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        assert self._process is not None, "it was not started"
        return self._process.poll()

    @property
    def can_start(self) -> bool:
        """Whether its host is up."""
        return self.host is None or self.host.is_up

    def pid(self) -> int | None:
        """Its process id as seen from here; None: it has ended."""
        if self._process is None or self.exit_code is not None:
            return None
        return self._process.program_pid() if isinstance(self._process, Process) else self._process.pid

    def signal(self, number: int) -> None:
        """Sends it a signal, and to no other process."""
        assert self._process is not None, "it was not started"
        self._process.send_signal(number)

    def wait(self) -> None:
        """Returns when it has ended."""
        if self._process is not None:
            self._process.wait(timeout=10)


class SupervisedRun:
    """One training, as a context manager that leaves no process behind.

    Attributes:
        folder: Of the run.
        hosts: None of them: this machine is the only one.
        launchers: By host.
        num_ranks: Of all hosts.
        disk: The file system of the run's folder, if it is one that may be filled.
        timeout_s: ``parallel.timeout_s`` of its configuration.
        step: The last step that its log tells of.
        starts: How often it has begun, at step 0 or at a checkpoint.
        started_at: The step at which it did so last.
        lines: What it has written since they were cleared.
        victims: Ids of processes that faults have ended: their end says nothing of what others notice.
        harmed_after: How often it had begun when the last fault came.
    """

    def __init__(
        self,
        config: Path,
        folder: RunFolder,
        log: Path,
        *,
        timeout_s: float,
        hosts: Sequence[Host] = (),
        ranks_per_host: int = 2,
        disk: Path | None = None,
    ) -> None:
        options = ["--cpu", "--processes", str(ranks_per_host), "--restarts", str(RESTARTS)]
        if hosts:
            options += ["--hosts", str(len(hosts)), "--master", hosts[0].name]
        self.folder = folder
        self.hosts = hosts
        places: Sequence[Host | None] = hosts or [None]
        self.launchers = [Launcher(host, options, config, log) for host in places]
        self.num_ranks = len(self.launchers) * ranks_per_host
        self.disk = disk
        self.timeout_s = timeout_s
        self.step = 0
        self.starts = 0
        self.started_at = 0
        self.lines: list[str] = []
        self.victims: set[int] = set()
        self.harmed_after = 0
        self._config = config
        self._log = log
        self._read_bytes = 0
        self._orphaned_since: float | None = None

    def start(self) -> None:
        """Starts all launchers."""
        for launcher in self.launchers:
            launcher.start()

    @property
    def finished(self) -> bool:
        """Whether all launchers have ended well."""
        return all(launcher.exit_code == 0 for launcher in self.launchers)

    @property
    def messages(self) -> list[str]:
        """The lines that are not about ordinary progress."""
        return [line for line in self.lines if not PROGRESS.match(line)]

    def ranks(self) -> dict[int, psutil.Process]:
        """The training processes that run under a launcher, by rank."""
        found = {}
        for launcher in self.launchers:
            with suppress(psutil.Error):
                for child in psutil.Process(launcher.pid()).children() if launcher.pid() is not None else ():
                    with suppress(psutil.Error):
                        if (rank := child.environ().get("RANK")) is not None:
                            found[int(rank)] = child
        return found

    def processes(self) -> list[psutil.Process]:
        """All that belong to this training, launchers among them."""
        config = str(self._config)
        found = [one for one in psutil.process_iter(["cmdline"]) if config in (one.info["cmdline"] or [])]
        return [one for one in found if one.pid != os.getpid()]

    def orphans(self) -> list[psutil.Process]:
        """The training processes that have lost their launcher."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                if "RANK" in process.environ() and process.ppid() not in {one.pid() for one in self.launchers}:
                    found.append(process)
        return found

    def poll(self) -> None:
        """Reads the log, and starts launchers again that have failed, on hosts that are up.

        Raises:
            AssertionError: Ranks go on although their launcher has ended.
        """
        self._read_log()
        failed = [one for one in self.launchers if one.exit_code not in (None, 0) and one.can_start]
        if not failed:
            self._orphaned_since = None
            return
        if orphans := self.orphans():
            now = time.monotonic()
            self._orphaned_since = self._orphaned_since or now
            assert now - self._orphaned_since < self.timeout_s, f"orphaned: {orphans}\n{self.tail()}"
            return
        self._orphaned_since = None
        for launcher in failed:
            launcher.start("run.resume=true")

    def wait_until(self, reached: Callable[[], bool], what: str, pause_s: float = POLL_S) -> None:
        """Polls until ``reached()``.

        Args:
            reached: Whether it is there.
            what: It, for the message.
            pause_s: Between two looks.

        Raises:
            AssertionError: The time is over; the message says what was waited for, and holds the log's end.
        """
        give_up = time.monotonic() + RECOVERY_S
        while not reached():
            self.poll()
            assert time.monotonic() < give_up, f"no {what} within {RECOVERY_S:g} s\n{self.tail()}"
            time.sleep(pause_s)

    def tail(self) -> str:
        """The last lines of the log, and the processes that are there."""
        table = [f"{one.pid} {one.info['cmdline'][:4]}" for one in self.processes()]
        return "\n".join([*self._log.read_text(errors="replace").splitlines()[-60:], *table])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        for launcher in self.launchers:
            launcher.wait()

    def _read_log(self) -> None:
        if not self._log.exists():
            return
        with self._log.open("rb") as file:
            file.seek(self._read_bytes)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            self.lines.append(line)
            if found := START.search(line):
                self.starts += 1
                self.started_at = self.step = int(found.group(1) or 0)
            elif found := STEP.search(line):
                self.step = int(found.group(1))


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Inside, ``folder`` is an empty file system of its own; hosts that boot meanwhile share it."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # hosts may still have it open
