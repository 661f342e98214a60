"""What environment variables of launchers say: torchrun's, which deepspeed and accelerate set too, srun's, mpirun's.

A launcher whose variables are half set, or which was asked for more processes than it has started, would have every
process train a model of its own, side by side. All of that is refused here.
"""

import itertools
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from distmoe.contracts import UserError

JOB = "slurm job"
"""With this begins the name of a job."""
EXPECTED = "DISTMOE_WORLD_SIZE"
"""The number of processes that whoever launches is going to start; a run with another number is refused."""


@dataclass(frozen=True)
class Place:
    """What a launcher says of one process.

    Attributes:
        rank: From 0.
        size: Number of processes.
        local_rank: Among the processes of its host.
        ranks_per_host: Processes on each host.
        restarts: How often the launcher has started all processes again.
        master: Address and port at which rank 0 is found; None: there is one process.
        agent_serves: Whether the launcher's own process serves the store there, not rank 0.
        launch: Names the launcher's process on this host, where it may start this one again; None: it does not.
        job: Names the job that a scheduler may queue again; None: there is none.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    ranks_per_host: int = 1
    restarts: int = 0
    master: tuple[str, int] | None = None
    agent_serves: bool = False
    launch: str | None = None
    job: str | None = None


@dataclass(frozen=True)
class _Launcher:
    """Names of one launcher's variables; of ``ranks_per_host`` the first that is there counts."""

    rank: str
    size: str
    local_rank: str
    ranks_per_host: tuple[str, ...]


_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # of Slurm: numbers from here on are shells and scripts, not steps
_TORCHRUN = _Launcher("RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
_SRUN = _Launcher("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ("SLURM_TASKS_PER_NODE",))
_MPIRUN = (
    _Launcher(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    _Launcher("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("MPI_LOCALNRANKS",)),
)


def started_by_launcher(environment: Mapping[str, str]) -> bool:
    """Whether there may be other processes, before their number is looked at."""
    return any(one.rank in environment for one in (_TORCHRUN, _SRUN, *_MPIRUN))


def read_place(environment: Mapping[str, str]) -> Place:
    """The place of this process among those of its launcher; without one it is alone.

    Raises:
        UserError: A variable is missing, not a number, or does not fit the others.
    """
    launcher = _launcher_of(environment)
    alone = Place(restarts=_restarts(environment), job=_job(environment))
    place = alone if launcher is None else _read(launcher, environment)
    expected = _number(environment, EXPECTED, place.size)
    if expected != place.size:
        raise UserError(
            f"{expected} processes were to be started (environment variable {EXPECTED}), but this one is in a world of "
            f"{place.size}: each would train a model of its own; start them with launch/torchrun.sh, or correct how "
            "the launcher is called"
        )
    return place


def _launcher_of(environment: Mapping[str, str]) -> _Launcher | None:
    if _number(environment, "WORLD_SIZE", 1) != 1 or "RANK" in environment:
        return _TORCHRUN
    # srun sets variables of MPI as well, for programs that use it, but not those of processes on a host.
    mpirun = [launcher for launcher in _MPIRUN if _number(environment, launcher.size, 1) > 1]
    if mpirun and mpirun[0].local_rank in environment:
        return mpirun[0]
    # The script of a batch job, or its interactive shell, is one process outside srun, whatever SLURM_NTASKS says.
    step = _number(environment, "SLURM_STEP_ID", _FIRST_SPECIAL_STEP)
    if step < _FIRST_SPECIAL_STEP and _number(environment, "SLURM_NTASKS", 1) > 1:
        return _SRUN
    if mpirun:
        return mpirun[0]
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if name in environment:
            raise _missing("RANK")
    if "ACCELERATE_MIXED_PRECISION" in environment:
        _check_accelerate(psutil.Process().parent())
    return None


def _read(launcher: _Launcher, environment: Mapping[str, str]) -> Place:
    size = _number(environment, launcher.size)
    if size < 1:
        raise UserError(f"environment variable {launcher.size} ({size}) must be 1 or more; unset it or correct it")
    rank, local_rank = (_number(environment, name) for name in (launcher.rank, launcher.local_rank))
    per_host = next((name for name in launcher.ranks_per_host if name in environment), launcher.ranks_per_host[-1])
    ranks_per_host = _number(environment, per_host, size)
    if rank >= size or not local_rank < ranks_per_host <= size or size % ranks_per_host:
        raise UserError(
            f"environment variables {launcher.rank} ({rank}), {launcher.size} ({size}), {launcher.local_rank} "
            f"({local_rank}) and {per_host} ({ranks_per_host}) do not fit together: ranks count from 0, and every host "
            "must have as many processes; correct how the launcher is called"
        )
    return Place(
        rank,
        size,
        local_rank,
        ranks_per_host,
        _restarts(environment),
        _master(launcher, environment) if size > 1 else None,
        agent_serves=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        launch=_launch() if "TORCHELASTIC_RUN_ID" in environment else None,
        job=_job(environment),
    )


def _restarts(environment: Mapping[str, str]) -> int:
    """Of torchrun, in this job; and of Slurm, which queues the job again."""
    return _number(environment, "TORCHELASTIC_RESTART_COUNT", 0) + _number(environment, "SLURM_RESTART_COUNT", 0)


def _master(launcher: _Launcher, environment: Mapping[str, str]) -> tuple[str, int]:
    if launcher is _SRUN and "MASTER_ADDR" not in environment and "SLURM_STEP_NODELIST" in environment:
        # Every step has a port of its own, in a range that systems neither reserve nor hand out.
        job, step = _number(environment, "SLURM_JOB_ID", 0), _number(environment, "SLURM_STEP_ID", 0)
        port = _number(environment, "MASTER_PORT", 20000 + (job * 7 + step) % 10000)
        return first_host(environment["SLURM_STEP_NODELIST"]), port
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise _missing(name)
    port = _number(environment, "MASTER_PORT")
    if not 0 < port < 2**16:
        raise UserError(f"environment variable MASTER_PORT ({port}) must be from 1 to 65535; correct it")
    return environment["MASTER_ADDR"], port


def _launch() -> str | None:
    """Torchrun does not count restarts because of a host that has joined; its own process stays the same."""
    try:
        parent = os.getppid()
        started = (
            Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
        )  # in ticks, whatever the clock
        return f"{platform.node()} {parent} {started}"
    except (OSError, IndexError):
        return None


def _job(environment: Mapping[str, str]) -> str | None:
    if "SLURM_JOB_ID" not in environment:
        return None
    return f"{JOB} {environment.get('SLURM_CLUSTER_NAME', '')} {environment['SLURM_JOB_ID']}"


def first_host(hosts: str) -> str:
    """The first of Slurm's notation for a list of hosts: ``node[003-010,12],login`` begins with ``node003``."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", hosts).partition(",")[0]


def _check_accelerate(parent: psutil.Process | None) -> None:
    """``accelerate launch --cpu --num_processes 2`` starts one process, without a word."""
    try:
        command = parent.cmdline() if parent is not None else []
    except psutil.Error:
        return
    asked = _asked_of_accelerate(command)
    if asked > 1:
        raise UserError(
            f"accelerate launch was asked for {asked} processes and has started one: on CPUs use launch/accelerate.sh, "
            "or ACCELERATE_USE_CPU=true accelerate launch --multi_gpu"
        )


def _asked_of_accelerate(command: Sequence[str]) -> int:
    words = [word for argument in command for word in argument.split("=", 1)]
    for option, value in itertools.pairwise(words):
        if option in ("--num_processes", "--num-processes") and value.isdecimal():
            return int(value)
    return 1


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None:
        if default is None:
            raise _missing(name)
        return default
    if name == "SLURM_TASKS_PER_NODE":  # "2(x3)": two on each of three hosts
        text = re.sub(r"\(x\d+\)$", "", text)
        if "," in text:
            raise UserError(
                f"environment variable {name} ({environment[name]}) gives hosts different numbers of processes: start "
                "as many on each (--ntasks-per-node)"
            )
    if not re.fullmatch(r"\d{1,10}", text, re.ASCII):
        raise UserError(f"environment variable {name} ({text!r}) must be a whole number; unset it or correct it")
    return int(text)


def _missing(name: str) -> UserError:
    return UserError(
        f"environment variable {name} is missing, though others say that there are several processes: start them with "
        "torchrun, deepspeed, accelerate launch or srun, or unset RANK, WORLD_SIZE and LOCAL_RANK to train in one"
    )
