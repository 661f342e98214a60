"""How torchrun's processes on several hosts find each other: ``torchrun --rdzv-backend distmoe``.

The algorithm is torch's own, that of its ``c10d`` and ``static`` backends. What differs:

* the store listens on the address of the endpoint only, not on all addresses of its host;
* the host that serves it is the one that has that address, whatever its own name stands for;
* every round of an elastic run gets a store of its own for its workers. With the shared one, a host that comes back
  waits for ever for the address that only the first round announces.

The entry point ``torchrun.handlers`` in pyproject.toml makes it known to torchrun.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler as dynamic_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from distmoe.contracts import UserError
from distmoe.parallel.endings import first_line, say
from distmoe.parallel.network import (
    interfaces,
    is_loopback,
    listening_socket,
    own_address_towards,
    reachable_address,
    resolve,
)

_NAME = "distmoe"
_DEFAULT_PORT = 29400
_ENDPOINT = "rendezvous endpoint"


class _Backend(C10dRendezvousBackend):
    """Keeps the state of the rendezvous; torchrun compares its name with the one it was asked for."""

    @property
    def name(self) -> str:
        return _NAME


class StaticRendezvous(RendezvousHandler):
    """Hosts whose ranks are given: nobody joins or leaves.

    Args:
        store: Served by the host of rank 0.
        params: ``config["rank"]`` is this host's.
        master: Where the store is.
    """

    def __init__(self, store: Any, params: RendezvousParameters, master: RendezvousStoreInfo) -> None:
        self._store = store
        self._params = params
        self._master = master

    def get_backend(self) -> str:
        """The name after ``--rdzv-backend``."""
        return _NAME

    @property
    def use_agent_store(self) -> bool:
        """Workers use the store of this rendezvous."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """All hosts, always."""
        store = dist.PrefixStore(self._params.run_id, self._store)  # type: ignore[attr-defined]
        return RendezvousInfo(store, int(self._params.config["rank"]), self._params.max_nodes, self._master)

    def is_closed(self) -> bool:
        """Never."""
        return False

    def set_closed(self) -> None:
        """Nobody else could come."""

    def num_nodes_waiting(self) -> int:
        """None can."""
        return 0

    def get_run_id(self) -> str:
        """Of ``--rdzv-id``."""
        return self._params.run_id

    def shutdown(self) -> bool:
        """There is nothing to take down but the store, which ends with its process."""
        return True


def handler_of_torchrun() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What torchrun's entry point asks for: the function that makes a handler."""
    return create_handler


def create_handler(params: RendezvousParameters) -> RendezvousHandler:
    """The handler for what was given to torchrun; what is wrong with it ends the process, with one message.

    Args:
        params: ``endpoint`` is ``HOST:PORT``, one that the processes of all hosts reach. ``rank`` in ``--rdzv-conf``
            makes the hosts' ranks fixed; ``read_timeout`` is in seconds; the others are those of ``c10d``.
    """
    try:
        return _handler(params)
    except (UserError, ValueError) as error:
        _stop(error)


def _handler(params: RendezvousParameters) -> RendezvousHandler:
    several_hosts = params.max_nodes > 1
    # Where one host is alone, which accelerate gives no endpoint for, any free port does.
    host, port = parse_rendezvous_endpoint(params.endpoint, _DEFAULT_PORT if several_hosts else 0)
    static = "rank" in params.config
    address = resolve(host, _ENDPOINT)
    serves = int(params.config["rank"]) == 0 if static else address in interfaces()
    if serves:
        address = reachable_address(host, _ENDPOINT, several_hosts)
    elif several_hosts and is_loopback(address):
        raise UserError(
            f"{_ENDPOINT} ({host}) is a loopback address here ({address}): give the address of the first host in the "
            "network, the same on all hosts"
        )
    store = _open_store(address, port, serves, params)
    if static:
        return StaticRendezvous(store, params, RendezvousStoreInfo(address, store.port))
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # a store for every round
    params.local_addr = params.local_addr or (address if serves else own_address_towards(address))
    return dynamic_handler(store, _Backend(store, params.run_id), params)


def _open_store(address: str, port: int, serves: bool, params: RendezvousParameters) -> Any:
    limit_s = params.get_as_int("read_timeout", 60)
    listener = listening_socket(address, port, f"{_ENDPOINT} ({params.endpoint})") if serves else None
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]
            address,
            port if listener is None else listener.getsockname()[1],
            is_master=serves,
            multi_tenant=True,
            timeout=timedelta(seconds=limit_s or 60),
            master_listen_fd=listener.detach() if listener is not None else None,
        )
    except (RuntimeError, ValueError) as error:  # dist.DistError is a RuntimeError
        raise UserError(
            f"{_ENDPOINT} ({params.endpoint}): nobody serves it ({first_line(str(error))}): start the first host too, "
            "give its address and a free port there, and look for a firewall between"
        ) from None


def _stop(error: ValueError) -> NoReturn:
    say(f"distmoe: error: {error}")
    raise SystemExit(2)
