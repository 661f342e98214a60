"""Names, interfaces and ports of this host, with faults planted in what the system says."""

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from distmoe.doctor import network
from distmoe.doctor.findings import Finding, fail, ok, warn

MEND = "a line `ADDRESS node7` in /etc/hosts, with this host's address in the network"
INTERFACES = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.7", "fe80::7%eth0"], "ib0": ["10.1.0.7"]}


@pytest.fixture(autouse=True)
def this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host node7 of two networks, whose name stands for its first address."""
    monkeypatch.setattr("platform.node", lambda: "node7")
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(variable, raising=False)
    set_interfaces(monkeypatch, INTERFACES)
    set_address(monkeypatch, "10.0.0.7")


def set_interfaces(monkeypatch: pytest.MonkeyPatch, interfaces: dict[str, list[str]]) -> None:
    def entry(address: str) -> Any:
        return SimpleNamespace(address=address, family=socket.AF_INET6 if ":" in address else socket.AF_INET)

    found = {name: [entry(address) for address in addresses] for name, addresses in interfaces.items()}
    monkeypatch.setattr("psutil.net_if_addrs", lambda: found)


def set_address(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    def resolve(name: str, *rest: Any, **options: Any) -> Any:
        assert name == "node7"
        if address is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]

    monkeypatch.setattr("socket.getaddrinfo", resolve)


def examined(several_hosts: bool, subject: str) -> Finding:
    (found,) = [one for one in network.examine_network(several_hosts, None) if one.subject == subject]
    return found


def test_host_of_two_networks():
    assert network.examine_network(several_hosts=True, port=None) == [
        ok("host name", "node7, 10.0.0.7"),
        ok("interfaces", "eth0 10.0.0.7; ib0 10.1.0.7; lo 127.0.0.1, ::1"),
    ]


@pytest.mark.parametrize(
    ("address", "found"),
    [
        (None, "node7 stands for no address here"),
        ("10.9.9.9", "node7 stands for 10.9.9.9, which is not an address of this host"),
    ],
)
def test_name_that_leads_elsewhere(address: str | None, found: str, monkeypatch: pytest.MonkeyPatch):
    set_address(monkeypatch, address)
    for several_hosts in (False, True):
        assert examined(several_hosts, "host name") == warn("host name", found, MEND)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.1.1"])  # the second is Debian's, and no interface has it
def test_name_that_stands_for_loopback(address: str, monkeypatch: pytest.MonkeyPatch):
    set_address(monkeypatch, address)
    assert examined(False, "host name") == ok("host name", f"node7, {address}: a loopback address, enough for one host")
    assert examined(True, "host name") == warn(
        "host name",
        f"node7 stands for {address} here, a loopback address: as the first host's name (MASTER_ADDR) it is refused",
        f"{MEND}; or export GLOO_SOCKET_IFNAME=eth0 or ib0",
    )
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert examined(True, "host name").level == "ok"


def test_host_without_a_network(monkeypatch: pytest.MonkeyPatch):
    set_interfaces(monkeypatch, {"lo": ["127.0.0.1"]})
    assert examined(False, "interfaces") == ok("interfaces", "lo 127.0.0.1")
    assert examined(True, "interfaces") == warn(
        "interfaces",
        "lo 127.0.0.1: no other host can be reached",
        "see what `ip address` says; in a container: docker run --network host",
    )


CHOSEN = {
    "gloo, one": ("GLOO_SOCKET_IFNAME", "eth0", None),
    "gloo, several": ("GLOO_SOCKET_IFNAME", "eth0,ib0", None),
    "gloo, unknown": ("GLOO_SOCKET_IFNAME", "eth1", "eth1: there is no interface eth1 here"),
    "gloo takes whole names": ("GLOO_SOCKET_IFNAME", "eth", "eth: there is no interface eth here"),
    "gloo, one of them unknown": ("GLOO_SOCKET_IFNAME", "eth0,eth9", "eth0,eth9: there is no interface eth9 here"),
    "NCCL takes beginnings": ("NCCL_SOCKET_IFNAME", "eth,en", None),
    "NCCL, unknown": ("NCCL_SOCKET_IFNAME", "en,wl", "en,wl: there is no interface en, wl here"),
    "NCCL, whole names": ("NCCL_SOCKET_IFNAME", "=eth", "=eth: there is no interface eth here"),
    "NCCL, all but": ("NCCL_SOCKET_IFNAME", "^docker", None),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_interfaces_that_variables_name(case: str, monkeypatch: pytest.MonkeyPatch):
    variable, value, problem = CHOSEN[case]
    monkeypatch.setenv(variable, value)
    remedy = f"set it to one of eth0, ib0, lo, or unset {variable}"
    expected = ok(variable, value) if problem is None else fail(variable, problem, remedy)
    assert examined(True, variable) == expected


def test_port_that_another_program_holds():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        holder.listen()
        found = network.examine_network(False, port)[-1]
    assert (found.level, found.subject) == ("warn", f"port {port}")
    assert found.found.startswith("cannot be used by the store of rank 0: Address already in use, by ")
    assert "python" in found.found.lower()
    assert found.remedy == f"export MASTER_PORT={port + 1}, or another that is free; the same for all processes"
    assert network.examine_network(False, port)[-1] == ok(f"port {port}", "free for the store of rank 0")
