"""Addresses and interfaces: where a store listens, and over which interface ranks talk to each other.

Nothing here listens on all addresses of a host: a store has no password, and whoever reaches it can end a run.
"""

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address

import psutil

from distmoe.contracts import UserError

_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_POLL_S = 0.1
_UNKNOWN_NAME_S = 5.0  # name servers may be late, but not for the whole of a time limit


def resolve(host: str, what: str) -> str:
    """The address of a host, an IPv4 one where there is one.

    Args:
        host: Name or address.
        what: Where it was given, for the message: ``MASTER_ADDR``.

    Raises:
        UserError: Its name is not known here.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # UnicodeError: a part of the name is empty or too long
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{what} ({host}): host {socket.gethostname()} does not know this name ({reason}): "
            "correct it, give the address instead, or add the name to /etc/hosts"
        ) from None
    addresses = [str(entry[4][0]) for entry in sorted(found, key=lambda entry: entry[0] != socket.AF_INET)]
    return addresses[0]


def interfaces() -> dict[str, str]:
    """The interface that has each address of this host."""
    families = (socket.AF_INET, socket.AF_INET6)
    found = [(name, one) for name, addresses in psutil.net_if_addrs().items() for one in addresses]
    return {one.address.partition("%")[0]: name for name, one in found if one.family in families}


def is_loopback(address: str) -> bool:
    """Whether no other host reaches it."""
    return ip_address(address.partition("%")[0]).is_loopback


def own_address_towards(address: str) -> str:
    """The address of this host from which packets to another address leave; sends nothing."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError:  # no route: whoever connects says so
            return address
        return str(probe.getsockname()[0])


def reachable_address(host: str, what: str, several_hosts: bool) -> str:
    """The address at which this host, which ``host`` names, can be reached by all processes of a run.

    ``GLOO_SOCKET_IFNAME`` decides where a name stands for a loopback address only, as on Debian a host's own name does.

    Raises:
        UserError: There is no such address.
    """
    address = resolve(host, what)
    if ip_address(address.partition("%")[0]).is_unspecified:
        raise UserError(
            f"{what} ({host}) stands for all addresses of a host, and whoever reaches one could end the run: give the "
            "one that the processes use, 127.0.0.1 if they are all on one host"
        )
    if not several_hosts or not is_loopback(address):
        return address
    # On other hosts, localhost or 127.0.0.1 is theirs, whatever the interface.
    named = _named_interfaces() if host not in ("localhost", address) else []
    given = [own for own, name in interfaces().items() if name in named and not is_loopback(own)]
    if not given:
        raise UserError(
            f"{what} ({host}) is a loopback address on host {socket.gethostname()} ({address}), which others do not "
            "reach: give the host's address in the network instead, correct /etc/hosts, or name the interface: "
            "GLOO_SOCKET_IFNAME=eth0"
        )
    return given[0]


def listening_socket(address: str, port: int, what: str) -> socket.socket:
    """A socket that listens on this address only; port 0: on any free one.

    Args:
        address: Of this host.
        port: Of it.
        what: Where they were given, for the message: ``MASTER_ADDR (host1), MASTER_PORT (29500)``.

    Raises:
        UserError: The port is taken, or the address is another host's.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a run that has just ended left it waiting
        listener.bind((address, port))
        listener.listen(socket.SOMAXCONN)
    except (OSError, OverflowError) as error:
        listener.close()
        reasons = {
            errno.EADDRINUSE: "the port is taken by another program: choose a free one, the same for all processes",
            errno.EADDRNOTAVAIL: f"{address} is not an address of host {socket.gethostname()}, which is to serve it: "
            "give an address of the host of rank 0",
            errno.EACCES: "the port is reserved: choose one from 1024 on",
        }
        number = error.errno if isinstance(error, OSError) else None
        raise UserError(f"{what}: {reasons.get(number or 0, str(error))}") from None
    return listener


def await_listener(address: str, port: int, limit_s: float) -> OSError | None:
    """Returns when somebody listens there: torch's own waiting prints a stack trace for each attempt.

    Returns:
        Why nobody was reached within ``limit_s`` seconds, or a few where the name is not known; None: somebody was.
    """
    started = time.monotonic()
    while True:
        try:
            socket.create_connection((address, port), timeout=max(min(limit_s, 5.0), 1.0)).close()
        except OSError as error:
            patience_s = _UNKNOWN_NAME_S if isinstance(error, socket.gaierror) else limit_s
            if time.monotonic() > started + min(patience_s, limit_s):
                return error
        else:
            return None
        time.sleep(_POLL_S)


@contextmanager
def chosen_interface(master: str, several_hosts: bool) -> Iterator[None]:
    """Inside, process groups talk over the interface that leads to ``master``; variables that are set stay as they are.

    Left to itself, gloo takes the address that the host's own name stands for, which is often a loopback one, and NCCL
    the first interface it finds, which may be one of a container bridge.

    Args:
        master: Name or address of rank 0's host.
        several_hosts: Otherwise gloo stays inside the host, and NCCL is left alone.

    Raises:
        UserError: ``GLOO_SOCKET_IFNAME`` names an interface that is not here.
    """
    _named_interfaces()
    own = own_address_towards(resolve(master, "MASTER_ADDR")) if several_hosts else "127.0.0.1"
    name = interfaces().get(own)
    chosen = {}
    if name is not None and not (several_hosts and is_loopback(own)):
        names = _INTERFACE_VARIABLES if several_hosts else _INTERFACE_VARIABLES[:1]
        # To NCCL a name is the beginning of names, unless it stands after "=".
        values = dict(zip(_INTERFACE_VARIABLES, (name, f"={name}"), strict=True))
        chosen = {variable: values[variable] for variable in names if variable not in os.environ}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for variable in chosen:
            os.environ.pop(variable, None)


def _named_interfaces() -> list[str]:
    """Those that ``GLOO_SOCKET_IFNAME`` names.

    Raises:
        UserError: One of them is not here; gloo would fail, and say where in its sources.
    """
    variable = _INTERFACE_VARIABLES[0]
    value, there = os.environ.get(variable, ""), set(interfaces().values())
    named = [name for name in value.split(",") if name]
    unknown = [name for name in named if name not in there]
    if unknown:
        raise UserError(
            f"environment variable {variable} ({value}): host {socket.gethostname()} has no interface "
            f"{', '.join(unknown)} with an address: set it to one of {', '.join(sorted(there))}, or unset it"
        )
    return named
