"""Which process this is among those a launcher has started, and the store through which they find each other.

A *store* is a small key-value server that all processes reach: rank 0 serves it, or the launcher's own process does. It
is opened before any process group, and carries what must be said when no exchange works any more.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distmoe.contracts import UserError
from distmoe.parallel.launchers import Place, read_place
from distmoe.parallel.network import await_listener, reachable_address
from distmoe.parallel.store import NoStoreError, reach_store, serve_store


@dataclass(frozen=True)
class World(Place):
    """The place of this process among all, and the way to the others; by default it is the only one.

    Attributes:
        store: A ``torch.distributed.Store`` that all processes reach; None: the one at ``master``.
    """

    store: Any = None

    @staticmethod
    def of_environment(environment: Mapping[str, str] = os.environ) -> "World":
        """What the launcher's variables say, see :mod:`distmoe.parallel.launchers`.

        Raises:
            UserError: A variable is missing, not a number, or does not fit the others.
        """
        return World(**vars(read_place(environment)))

    @property
    def serves_store(self) -> bool:
        """Whether the store ends with this process."""
        return self.store is None and self.rank == 0 and not self.agent_serves

    @property
    def several_hosts(self) -> bool:
        """Whether there are processes on other hosts."""
        return self.size > self.ranks_per_host

    def open_store(self, limit_s: float) -> Any:
        """Connects to the store; rank 0 serves it, on the master's address only.

        Args:
            limit_s: Seconds after which a rank that finds none gives up.

        Raises:
            UserError: Nobody serves it, or its address or port cannot be used.
        """
        if self.store is not None:
            return self.store
        assert self.master is not None, "several processes have a master"
        address, port = self.master
        named = f"MASTER_ADDR ({address}), MASTER_PORT ({port})"
        try:
            if self.serves_store:
                own = reachable_address(address, "MASTER_ADDR", self.several_hosts)
                return serve_store(own, port, limit_s, named)
            _await_server(address, port, limit_s, self.rank)
            return reach_store(address, port, limit_s)
        except NoStoreError as error:
            raise UserError(
                f"rank {self.rank}: the store at {named} cannot be opened ({error}): another program has the port; "
                "choose a free one, the same for all processes, and rank 0's address"
            ) from None


def _await_server(address: str, port: int, limit_s: float, rank: int) -> None:
    error = await_listener(address, port, limit_s)
    if isinstance(error, socket.gaierror):
        raise UserError(
            f"rank {rank}: host {socket.gethostname()} does not know the name in MASTER_ADDR ({address}: "
            f"{error.strerror}): correct it, give the address instead, or add the name to /etc/hosts"
        )
    if error is not None:
        raise UserError(
            f"rank {rank}: nobody answers at MASTER_ADDR ({address}), MASTER_PORT ({port}) for {limit_s:g} s "
            f"({error.strerror or error}): rank 0 has not started or has ended, the address is not its own, or a "
            "firewall is between; start all processes, or set parallel.timeout_s to wait longer"
        )
