"""Launches of the tiny run: the same training by any launcher, here or on imitated hosts, watched until it ends."""

import itertools
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from distmoe.training.run_folder import RunFolder
from tests.conftest import REPOSITORY
from tests.launch.hosts import Host
from tests.launch.processes import environment as programs_of_this_python
from tests.runs import checkpoint_steps, metrics_lines, write_tiny_config

TIMEOUT_S = 240.0  # several times what a launch takes on two processors that have other things to do
LOOK_S = 1.0  # a listener is there as long as what it serves; looking costs the launch processor time
POLL_S = 0.1
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


@dataclass
class Outcome:
    """How a launch ended.

    Attributes:
        codes: Exit codes of the launchers.
        logs: What they wrote.
        seconds: From the start to the end.
        listening: By launcher, the addresses and ports on which its host, or here its processes, listened at any time.
    """

    codes: list[int]
    logs: list[str]
    seconds: float
    listening: list[set[tuple[str, int]]] = field(default_factory=list)


class Launch:
    """One launch in an empty folder.

    Attributes:
        folder: Holds the configuration, the runs and the logs.
        runs: Where run folders are made; in it the configuration.
        config: Of the tiny run, but for ``data.path``, which comes with the command.
    """

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.runs, self._data = folder, folder / "runs", data
        self.config = write_tiny_config(data, self.runs, "data.path=null")

    def command(
        self, script: str, *options: object, overrides: Sequence[str] = (), checkout: Path = REPOSITORY
    ) -> list[str]:
        """What trains with ``launch/<script>.sh`` of a checkout, on CPUs."""
        words = [checkout / "launch" / f"{script}.sh", "--cpu", *options, self.config, f"data.path={self._data}"]
        return ["bash", *map(str, words), *overrides]

    def here(self, command: Sequence[str], **environment: str) -> Outcome:
        """Runs a command on this machine."""
        log = self.folder / "here.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env={**programs_of_this_python(), **ENVIRONMENT, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this process, which then ends it
            )
        listening: set[tuple[str, int]] = set()

        def look() -> None:
            for member in _family(process.pid):
                with suppress(psutil.Error):
                    for one in member.net_connections("tcp"):
                        if one.status == psutil.CONN_LISTEN:
                            listening.add((one.laddr.ip, one.laddr.port))

        def end() -> None:
            for member in _family(process.pid):
                with suppress(psutil.Error):
                    member.kill()

        return _watch([process], [log], [listening], look, end)

    def on(
        self,
        hosts: Sequence[Host],
        commands: Sequence[Sequence[str]],
        folders: Sequence[Path] = (),
        **environment: str,
    ) -> Outcome:
        """Runs a command on each of several hosts.

        Args:
            hosts: Those that are watched; the first ones have commands.
            commands: One a host.
            folders: The working directories; none: the repository.
            environment: Added on all hosts.
        """
        listening: list[set[tuple[str, int]]] = [set() for _ in hosts]

        def look() -> None:
            for host, seen in zip(hosts, listening, strict=True):
                seen.update((one.address, one.port) for one in host.listening())

        def end() -> None:
            for host in hosts:
                host.kill()
                host.boot()

        logs = [self.folder / f"{host.name}.log" for host in hosts[: len(commands)]]
        places = itertools.chain(folders, itertools.repeat(REPOSITORY))
        processes = [
            host.popen(command, log=log, env={**ENVIRONMENT, **environment}, cwd=place)
            for host, command, log, place in zip(hosts, commands, logs, places, strict=False)
        ]
        return _watch(processes, logs, listening, look, end)

    def assert_same_as(self, alone: RunFolder, outcome: Outcome, **summary: Any) -> None:
        """One run, with the losses of the one-process run, whose summary has these entries."""
        assert set(outcome.codes) == {0}, "\n".join(outcome.logs)
        assert sorted(path.name for path in self.runs.iterdir()) == ["config.yaml", "run"]
        run = RunFolder(self.runs / "run")
        written = run.read_summary()
        assert written is not None
        assert {key: written[key] for key in summary} == summary
        ours, theirs = metrics_lines(run), metrics_lines(alone)
        assert [(line["step"], line.get("split")) for line in ours] == [
            (line["step"], line.get("split")) for line in theirs
        ]
        # float32 sums in another order, over 10 steps in which no token comes to change its expert.
        assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-4)
        assert checkpoint_steps(run) == checkpoint_steps(alone)

    def assert_nothing_written(self, outcome: Outcome) -> None:
        """No launcher succeeded, and there is no run."""
        assert 0 not in outcome.codes, "\n".join(outcome.logs)
        assert [path.name for path in self.runs.iterdir()] == ["config.yaml"]

    def all_written(self) -> str:
        """Everything in the logs and in the run's folder."""
        return "".join(path.read_text(errors="replace") for path in self.folder.rglob("*") if path.is_file())


def _watch(
    processes: Sequence[subprocess.Popen[Any]],
    logs: Sequence[Path],
    listening: list[set[tuple[str, int]]],
    look: Callable[[], None],
    end: Callable[[], None],
) -> Outcome:
    """Looks around until all have ended; ends what is left when the time is over."""
    begin = looked = time.monotonic()
    try:
        while any(process.poll() is None for process in processes):
            assert time.monotonic() < begin + TIMEOUT_S, "\n".join(log.read_text(errors="replace") for log in logs)
            if time.monotonic() > looked + LOOK_S:
                look()
                looked = time.monotonic()
            time.sleep(POLL_S)
    except BaseException:
        end()
        raise
    codes, texts = [process.returncode for process in processes], [log.read_text(errors="replace") for log in logs]
    return Outcome(codes, texts, time.monotonic() - begin, listening)


def _family(pid: int) -> list[psutil.Process]:
    """A process with its children and theirs."""
    with suppress(psutil.Error):
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    return []
