"""Which process this is among those a launcher has started, and the store through which they find each other.

A *store* is a small key-value server that all processes reach: rank 0 serves it, or the launcher's own process does. It
is opened before any process group, and carries what must be said when no exchange works any more.
"""

import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from distmoe.contracts import UserError
from distmoe.parallel.endings import first_line

_POLL_S = 0.1


@dataclass(frozen=True)
class World:
    """The place of this process among all; by default it is the only one.

    Attributes:
        rank: This process, from 0.
        size: Number of processes.
        local_rank: This process among those of its host.
        ranks_per_host: Processes on each host.
        restarts: How often the launcher has started all processes again.
        store: A ``torch.distributed.Store`` that all processes reach; None: the one at ``MASTER_ADDR:MASTER_PORT``.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    ranks_per_host: int = 1
    restarts: int = 0
    store: Any = None

    @staticmethod
    def of_environment(environment: Mapping[str, str] = os.environ) -> "World":
        """What the launcher's variables say: those of torchrun, deepspeed and accelerate, or Slurm's.

        Raises:
            UserError: A variable is missing, not a number, or does not fit the others.
        """
        restarts = _number(environment, "TORCHELASTIC_RESTART_COUNT", 0)
        world_size = _number(environment, "WORLD_SIZE", 1)
        if world_size < 1:
            raise UserError(f"environment variable WORLD_SIZE ({world_size}) must be 1 or more; unset it or correct it")
        if world_size > 1 or "RANK" in environment:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
            per_host = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environment else "LOCAL_SIZE"
        elif _started_by_srun(environment):
            names, per_host = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"), "SLURM_TASKS_PER_NODE"
        else:
            return World(restarts=restarts)
        rank, size, local_rank = (_number(environment, name) for name in names)
        ranks_per_host = _number(environment, per_host, size)
        if size > 1:
            for name in ("MASTER_ADDR", "MASTER_PORT"):
                if name not in environment:
                    raise _missing(name)
            _number(environment, "MASTER_PORT")
        if rank >= size or not local_rank < ranks_per_host <= size or size % ranks_per_host:
            raise UserError(
                f"environment variables {names[0]} ({rank}), {names[1]} ({size}), {names[2]} ({local_rank}) and "
                f"{per_host} ({ranks_per_host}) do not fit together: ranks count from 0, and every host must have as "
                "many processes; correct how the launcher is called"
            )
        return World(rank, size, local_rank, ranks_per_host, restarts)

    @property
    def serves_store(self) -> bool:
        """Whether the store ends with this process."""
        return self.store is None and self.rank == 0 and not _agent_serves()

    def open_store(self, limit_s: float) -> Any:
        """Connects to the store.

        Args:
            limit_s: Seconds after which a rank that finds none gives up.

        Raises:
            UserError: Nobody serves it, or its address or port cannot be used.
        """
        if self.store is not None:
            return self.store
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if not self.serves_store:
            _await_server(address, port, limit_s, self.rank)
        try:
            return dist.TCPStore(  # type: ignore[attr-defined]
                address,
                port,
                is_master=self.serves_store,
                timeout=timedelta(seconds=limit_s),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except (RuntimeError, ValueError) as error:  # dist.DistError is a RuntimeError
            raise UserError(
                f"rank {self.rank}: the store at MASTER_ADDR ({address}), MASTER_PORT ({port}) cannot be opened "
                f"({first_line(str(error))}); choose a free port, the same for all processes, and rank 0's address"
            ) from None


def _await_server(address: str, port: int, limit_s: float, rank: int) -> None:
    """Returns when somebody listens: torch's own waiting prints a stack trace for each attempt."""
    give_up = time.monotonic() + limit_s
    while True:
        try:
            socket.create_connection((address, port), timeout=max(min(limit_s, 5.0), 1.0)).close()
        except OSError as error:
            if time.monotonic() > give_up:
                raise UserError(
                    f"rank {rank}: nobody answers at MASTER_ADDR ({address}), MASTER_PORT ({port}) for {limit_s:g} s "
                    f"({error.strerror or error}): rank 0 has not started or has ended, the address is not its own, or "
                    "a firewall is between; start all processes, or set parallel.timeout_s to wait longer"
                ) from None
            time.sleep(_POLL_S)
        else:
            return


def _started_by_srun(environment: Mapping[str, str]) -> bool:
    """Inside an allocation, but outside ``srun``, there is one process, whatever SLURM_NTASKS says."""
    step = "SLURM_STEP_ID" in environment or "MASTER_ADDR" in environment
    return step and "SLURM_PROCID" in environment and _number(environment, "SLURM_NTASKS", 1) > 1


def _agent_serves() -> bool:
    """Whether torchrun's own process serves the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None:
        if default is None:
            raise _missing(name)
        return default
    if name == "SLURM_TASKS_PER_NODE":  # "2(x3)": two on each of three hosts
        text = re.sub(r"\(x\d+\)$", "", text)
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise UserError(f"environment variable {name} ({text!r}) must be a whole number; unset it or correct it")
    return int(text)


def _missing(name: str) -> UserError:
    return UserError(
        f"environment variable {name} is missing, though others say that there are several processes: start them with "
        "torchrun, deepspeed, accelerate launch or srun, or unset RANK and WORLD_SIZE to train in one process"
    )
