"""How torchrun's processes on several hosts find each other: ``torchrun --rdzv-backend distmoe``.

The algorithm is torch's own, that of its ``c10d`` and ``static`` backends. What differs:

* the store listens on the address of the endpoint only, not on all addresses of its host;
* the host that serves it is the one that has that address, whatever its own name stands for;
* every round of an elastic run gets a store of its own for its workers. With the shared one, a host that comes back
  waits for ever for the address that only the first round announces.

The entry point ``torchrun.handlers`` in pyproject.toml makes it known to torchrun.
"""

import os
import re
import time
from collections.abc import Callable
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler as dynamic_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from distmoe.contracts import UserError
from distmoe.parallel.endings import say
from distmoe.parallel.network import (
    await_listener,
    interfaces,
    is_loopback,
    own_address_towards,
    reachable_address,
    resolve,
)
from distmoe.parallel.signs import listed
from distmoe.parallel.store import NoStoreError, reach_store, serve_store

_NAME = "distmoe"
_DEFAULT_PORT = 29400
_ENDPOINT = "rendezvous endpoint"
_READ_S, _JOIN_S = 60, 600  # torch's own
_POLL_S = 0.1


class _Backend(C10dRendezvousBackend):
    """Keeps the state of the rendezvous; torchrun compares its name with the one it was asked for."""

    @property
    def name(self) -> str:
        return _NAME


class StaticRendezvous(RendezvousHandler):
    """Hosts whose ranks are given: nobody joins or leaves.

    Args:
        store: Served by the host of rank 0.
        master: Where the store is.
        params: Of the rendezvous; ``max_nodes`` hosts take part.
        rank: Of this host.
        limit_s: For how long hosts wait for each other.
    """

    def __init__(
        self, store: Any, master: RendezvousStoreInfo, params: RendezvousParameters, rank: int, limit_s: int
    ) -> None:
        self._store = store
        self._master = master
        self._params = params
        self._rank = rank
        self._limit_s = limit_s

    def get_backend(self) -> str:
        """The name after ``--rdzv-backend``."""
        return _NAME

    @property
    def use_agent_store(self) -> bool:
        """Workers use the store of this rendezvous."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """All hosts, always; waits until they have come. Where some do not, ends the process, with one message."""
        store = dist.PrefixStore(self._params.run_id, self._store)  # type: ignore[attr-defined]
        keys = [f"host {rank} has come" for rank in range(self._params.max_nodes)]
        store.set(keys[self._rank], "1")
        give_up = time.monotonic() + self._limit_s
        while not store.check(keys):
            if time.monotonic() > give_up:
                missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
                _stop(
                    UserError(
                        f"only {len(keys) - len(missing)} of {len(keys)} hosts have come to {_ENDPOINT} "
                        f"({self._params.endpoint}) within {self._limit_s} s; rank {listed(missing)} has not: start "
                        "all of them, each with a rank of its own, or raise join_timeout in --rdzv-conf"
                    )
                )
            time.sleep(_POLL_S)
        return RendezvousInfo(store, self._rank, self._params.max_nodes, self._master)

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
            makes the hosts' ranks fixed; ``read_timeout`` is for how many seconds the store is looked for, and
            ``join_timeout`` for how many hosts wait for each other; the others are those of ``c10d``.
    """
    try:
        return _handler(params)
    except (UserError, ValueError) as error:
        _stop(error)


def _handler(params: RendezvousParameters) -> RendezvousHandler:
    several_hosts = params.max_nodes > 1
    # Where one host is alone, which accelerate gives no endpoint for, any free port does.
    host, port = parse_rendezvous_endpoint(params.endpoint, _DEFAULT_PORT if several_hosts else 0)
    if several_hosts and port == 0:
        raise UserError(f"{_ENDPOINT} ({params.endpoint}): other hosts would not know port 0: give one from 1 to 65535")
    rank, join_s = _fixed_rank(params), _seconds(params, "join_timeout", _JOIN_S)
    address = resolve(host, _ENDPOINT)
    own = not several_hosts or is_loopback(address) or address in interfaces()
    serves = own if rank is None else rank == 0
    if serves:
        address = reachable_address(host, _ENDPOINT, several_hosts)
    elif is_loopback(address):
        raise UserError(
            f"{_ENDPOINT} ({host}) is a loopback address here ({address}): give the address of the first host in the "
            "network, the same on all hosts"
        )
    store = _open_store(address, port, serves, params)
    if rank is not None:
        return StaticRendezvous(store, RendezvousStoreInfo(address, store.port), params, rank, join_s)
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # a store for every round
    params.local_addr = params.local_addr or (address if serves else own_address_towards(address))
    return dynamic_handler(store, _Backend(store, params.run_id), params)


def _fixed_rank(params: RendezvousParameters) -> int | None:
    """Of this host, where the hosts' ranks are fixed."""
    given = params.get("rank")
    if given is None:
        return None
    place = f"rank ({given}) in --rdzv-conf"
    if params.min_nodes != params.max_nodes:
        raise UserError(
            f"{place} fixes the hosts, and --nnodes ({params.min_nodes}:{params.max_nodes}) leaves them open: drop one"
        )
    if not re.fullmatch(r"\d{1,9}", str(given), re.ASCII) or int(given) >= params.max_nodes:
        raise UserError(
            f"{place} must be a whole number from 0 to {params.max_nodes - 1}: another one on each of the "
            f"{params.max_nodes} hosts, and 0 on the one of the endpoint"
        )
    return int(given)


def _open_store(address: str, port: int, serves: bool, params: RendezvousParameters) -> Any:
    limit_s = _seconds(params, "read_timeout", _READ_S)
    place = f"{_ENDPOINT} ({params.endpoint})"
    try:
        if serves:
            return serve_store(address, port, limit_s, place)
        error = await_listener(address, port, limit_s)
        if error is not None:
            raise UserError(
                f"{place}: nobody serves it for {limit_s} s ({error.strerror or error}): start the first host too, "
                "give its address and a free port there, and look for a firewall between"
            )
        return reach_store(address, port, limit_s)
    except NoStoreError as error:
        raise UserError(
            f"{place}: what listens there is no store ({error}): another program has the port; choose a free one of "
            "the first host, the same on all"
        ) from None


def _seconds(params: RendezvousParameters, name: str, default: int) -> int:
    given = params.get(name, default)
    if not re.fullmatch(r"[1-9]\d{0,8}", str(given), re.ASCII):
        raise UserError(f"{name} ({given}) in --rdzv-conf must be a whole number of seconds, 1 or more")
    return int(given)


def _stop(error: ValueError) -> NoReturn:
    say(f"distmoe: error: {error}")
    raise SystemExit(2)
