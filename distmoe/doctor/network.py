"""The network as this host sees it: its own name, its interfaces, the port of the store."""

import os
import platform
import socket

import psutil

from distmoe.contracts import UserError
from distmoe.doctor.findings import Finding, fail, ok, warn
from distmoe.parallel.network import interfaces, is_loopback, resolve

_HOSTS_FILE = "/etc/hosts"


def examine_network(several_hosts: bool, port: int | None) -> list[Finding]:
    """Name, interfaces and port.

    Args:
        several_hosts: Whether a run has processes on other hosts.
        port: That rank 0 would serve the store at; None: it does so already.
    """
    found = [_own_name(several_hosts), _interfaces(several_hosts), *_chosen_interfaces()]
    return [*found, _port(port)] if port is not None else found


def reachable_interfaces() -> list[str]:
    """Names of the interfaces with an address that other hosts may reach."""
    return sorted({name for address, name in interfaces().items() if not is_loopback(address)})


def _own_name(several_hosts: bool) -> Finding:
    """What this host takes its own name for: at worst a warning, since a run goes by the first host's name alone."""
    subject, name = "host name", platform.node()
    mend = f"a line `ADDRESS {name}` in {_HOSTS_FILE}, with this host's address in the network"
    try:
        address = resolve(name, subject)
    except UserError:
        return warn(subject, f"{name} stands for no address here", mend)
    if not is_loopback(address):
        if address not in interfaces():
            return warn(subject, f"{name} stands for {address}, which is not an address of this host", mend)
        return ok(subject, f"{name}, {address}")
    if not several_hosts:
        return ok(subject, f"{name}, {address}: a loopback address, enough for one host")
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return ok(subject, f"{name}, {address}: a loopback address; GLOO_SOCKET_IFNAME decides instead")
    names = " or ".join(reachable_interfaces()) or "NAME"
    return warn(
        subject,
        f"{name} stands for {address} here, a loopback address: as the first host's name (MASTER_ADDR) it is refused",
        f"{mend}; or export GLOO_SOCKET_IFNAME={names}",
    )


def _interfaces(several_hosts: bool) -> Finding:
    by_name: dict[str, list[str]] = {}
    for address, name in interfaces().items():
        if not address.startswith("fe80:"):  # every interface has one, and nobody connects to it
            by_name.setdefault(name, []).append(address)
    if several_hosts and not reachable_interfaces():
        return warn(
            "interfaces",
            f"{_listed(by_name) or 'none'}: no other host can be reached",
            "see what `ip address` says; in a container: docker run --network host",
        )
    return ok("interfaces", _listed(by_name) or "none")


def _listed(by_name: dict[str, list[str]]) -> str:
    return "; ".join(f"{name} {', '.join(addresses)}" for name, addresses in sorted(by_name.items()))


def _chosen_interfaces() -> list[Finding]:
    """What the variables of gloo and NCCL name, which both take at their word."""
    there, findings = sorted(set(psutil.net_if_addrs())), []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = os.environ.get(variable, "")
        # NCCL's are beginnings of names, after = whole names, after ^ those to leave out.
        wanted = [] if value.startswith("^") else [one for one in value.removeprefix("=").split(",") if one]
        whole = variable.startswith("GLOO") or value.startswith("=")
        unknown = [
            one for one in wanted if not any(name == one or (not whole and name.startswith(one)) for name in there)
        ]
        if unknown and (whole or len(unknown) == len(wanted)):
            findings.append(
                fail(
                    variable,
                    f"{value}: there is no interface {', '.join(unknown)} here",
                    f"set it to one of {', '.join(there)}, or unset {variable}",
                )
            )
        elif value:
            findings.append(ok(variable, value))
    return findings


def _port(port: int) -> Finding:
    subject = f"port {port}"
    try:
        with socket.socket() as probe:  # bound, but never listening: nobody can connect
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError as error:
        free = port + 1 if 1024 <= port < 65535 else 29500
        return warn(
            subject,
            f"cannot be used by the store of rank 0: {error.strerror}{_holder(port)}",
            f"export MASTER_PORT={free}, or another that is free; the same for all processes",
        )
    return ok(subject, "free for the store of rank 0")


def _holder(port: int) -> str:
    """The program that listens there, as far as this user may know."""
    try:
        listening = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
        pid = next((one.pid for one in listening if one.laddr.port == port and one.pid), None)
        return f", by {psutil.Process(pid).name()} (process {pid})" if pid else ""
    except (psutil.Error, OSError):
        return ""
