"""Addresses and interfaces: what a name stands for here, where a store listens, over which interface ranks talk."""

import errno
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from distmoe.contracts import UserError
from distmoe.parallel import network

# A host with two networks, and what its resolver makes of names: on Debian a host's own name is 127.0.1.1.
ADDRESSES = {
    "lo": ["127.0.0.1", "::1"],
    "eth0": ["10.7.0.1", "fd00::1", "fe80::1%eth0"],
    "eth1": ["10.8.0.1"],
    "down": [],
}
NAMES = {
    "localhost": ["127.0.0.1"],
    "debian": ["127.0.1.1"],
    "host1": ["10.7.0.1"],
    "six": ["fd00::1"],
    "both": ["fd00::1", "10.7.0.1"],
}


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo

    def getaddrinfo(name: Any, *args: Any, **kwargs: Any) -> Any:
        if name not in NAMES:
            return real(name, *args, **kwargs)
        return [(family_of(one), socket.SOCK_STREAM, 6, "", (one, 0)) for one in NAMES[name]]

    def net_if_addrs() -> dict[str, list[Any]]:
        hardware = SimpleNamespace(family=psutil.AF_LINK, address="02:fc:00:00:00:01")
        return {
            name: [*(SimpleNamespace(family=family_of(one), address=one) for one in addresses), hardware]
            for name, addresses in ADDRESSES.items()
        }

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    monkeypatch.setattr(psutil, "net_if_addrs", net_if_addrs)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("host1", "10.7.0.1"),
        ("both", "10.7.0.1"),
        ("six", "fd00::1"),
        ("192.0.2.9", "192.0.2.9"),
        ("fd00::9", "fd00::9"),
    ],
)
def test_a_name_stands_for_an_ipv4_address_where_it_has_one(name: str, address: str):
    assert network.resolve(name, "MASTER_ADDR") == address


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("name", ["no.such.host.invalid", "", "a..b", "x" * 64])
def test_unknown_name_is_told_with_its_place(name: str):
    message = f"MASTER_ADDR ({name}): host here does not know this name ("
    with pytest.raises(UserError, match=re.escape(message) + ".+: correct it, give the address instead, or add the"):
        network.resolve(name, "MASTER_ADDR")


@pytest.mark.usefixtures("host")
def test_interfaces_by_address():
    assert network.interfaces() == {
        "127.0.0.1": "lo", "::1": "lo", "10.7.0.1": "eth0", "fd00::1": "eth0", "fe80::1": "eth0", "10.8.0.1": "eth1"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1", True), ("127.0.1.1", True), ("::1", True), ("10.7.0.1", False), ("0.0.0.0", False),
        ("fe80::1%eth0", False), ("128.0.0.1", False),
    ],
)  # fmt: skip
def test_loopback_addresses(address: str, loopback: bool):
    assert network.is_loopback(address) == loopback


def test_own_address_is_the_one_that_packets_leave_from(monkeypatch: pytest.MonkeyPatch):
    assert network.own_address_towards("127.0.0.9") == "127.0.0.1"

    def unreachable(self: socket.socket, address: Any) -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", unreachable)
    assert network.own_address_towards("10.9.0.1") == "10.9.0.1"


ALL_ADDRESSES = "stands for all addresses of a host, and whoever reaches one could end the run: give the one that"
LOOPBACK = (
    r"is a loopback address on host here \(127\.0\.\d\.1\), which others do not reach: give the host's address in"
)
# Host, whether there are others, GLOO_SOCKET_IFNAME, and the address, or what is said.
REACHABLE = {
    "alone": ("localhost", False, None, "127.0.0.1"),
    "alone, by its own name": ("debian", False, None, "127.0.1.1"),
    "alone, on the network": ("host1", False, None, "10.7.0.1"),
    "with others": ("host1", True, None, "10.7.0.1"),
    "with others, another interface named": ("host1", True, "eth1", "10.7.0.1"),
    "own name on Debian": ("debian", True, "eth1", "10.8.0.1"),
    "own name on Debian, one of two interfaces": ("debian", True, "lo,eth0", "10.7.0.1"),
    "own name on Debian, no interface": ("debian", True, None, LOOPBACK),
    "own name on Debian, loopback interface": ("debian", True, "lo", LOOPBACK),
    "own name on Debian, unknown interface": (
        "debian",
        True,
        "eth9",
        r"\(eth9\): host here has no interface eth9 with",
    ),
    # On each host it is another one, whatever the interface.
    "localhost for others": ("localhost", True, "eth0", LOOPBACK),
    "loopback address for others": ("127.0.0.1", True, "eth0", LOOPBACK),
    "all addresses": ("0.0.0.0", False, None, ALL_ADDRESSES),
    "all addresses, for others": ("::", True, "eth0", ALL_ADDRESSES),
}


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("case", REACHABLE)
def test_address_at_which_others_reach_this_host(case: str, monkeypatch: pytest.MonkeyPatch):
    name, several_hosts, interface, expected = REACHABLE[case]
    if interface is not None:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    if " " not in expected:
        assert network.reachable_address(name, "MASTER_ADDR", several_hosts) == expected
        return
    with pytest.raises(UserError, match=expected):
        network.reachable_address(name, "MASTER_ADDR", several_hosts)


def listening(port: int) -> list[str]:
    """The addresses on which this process listens at a port."""
    found = psutil.Process().net_connections("tcp")
    return [one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN and one.laddr.port == port]


def test_socket_listens_on_one_address():
    with network.listening_socket("127.0.0.2", 0, "here") as listener:
        address, port = listener.getsockname()
        assert (address, listening(port)) == ("127.0.0.2", ["127.0.0.2"])
        socket.create_connection((address, port)).close()


def test_port_of_a_run_that_has_just_ended_is_free():
    with network.listening_socket("127.0.0.1", 0, "here") as listener:
        port = listener.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        listener.accept()[0].close()  # who closes first keeps the port for a minute
        client.close()
    network.listening_socket("127.0.0.1", port, "here").close()


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another program listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


UNUSABLE = {
    "taken": ("127.0.0.1", 0, "the port is taken by another program: choose a free one"),
    "of another host": ("203.0.113.7", 29500, "203.0.113.7 is not an address of host"),
    "reserved": ("127.0.0.1", 80, "the port is reserved: choose one from 1024 on"),
    "no port": ("127.0.0.1", 70000, "port must be 0-65535"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_address_that_cannot_be_listened_on(case: str, taken: int, monkeypatch: pytest.MonkeyPatch):
    address, port, message = UNUSABLE[case]
    if case == "reserved":  # not for root, which tests may run as

        def refuse(self: socket.socket, address: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(UserError, match=r"^MASTER_PORT \(x\): ") as error:
        network.listening_socket(address, port or taken, "MASTER_PORT (x)")
    assert message in str(error.value)


def test_somebody_who_listens_late_is_waited_for(taken: int):
    assert network.await_listener("127.0.0.1", taken, 5.0) is None
    late = network.listening_socket("127.0.0.1", 0, "here")
    address = late.getsockname()
    late.close()
    with ExitStack() as opened:
        timer = threading.Timer(0.3, lambda: opened.enter_context(network.listening_socket(*address, "here")))
        timer.start()
        started = time.monotonic()
        assert network.await_listener(*address, 5.0) is None
        assert 0.2 < time.monotonic() - started < 3.0
        timer.join()


def test_nobody_who_listens_is_not_waited_for_long():
    started = time.monotonic()
    assert isinstance(network.await_listener("127.0.0.1", 1, 0.3), ConnectionRefusedError)
    assert 0.3 < time.monotonic() - started < 2.0


# Master, whether there are other hosts, what the caller has set, and what is chosen besides.
CHOSEN: dict[str, tuple[str, bool, dict[str, str], dict[str, str]]] = {
    "one host": ("host1", False, {}, {"GLOO_SOCKET_IFNAME": "lo"}),
    "several": ("host1", True, {}, {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "=eth0"}),
    "gloo's set": ("host1", True, {"GLOO_SOCKET_IFNAME": "eth1"}, {"NCCL_SOCKET_IFNAME": "=eth0"}),
    "NCCL's set": ("host1", True, {"NCCL_SOCKET_IFNAME": "ib"}, {"GLOO_SOCKET_IFNAME": "eth0"}),
    "one host, gloo's set": ("host1", False, {"GLOO_SOCKET_IFNAME": "eth0,lo"}, {}),
    # The master's own name, there: reachable_address has seen that GLOO_SOCKET_IFNAME is set.
    "loopback address for others": ("debian", True, {}, {}),
    "no interface has it": ("192.0.2.9", True, {}, {}),
}


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("case", CHOSEN)
def test_interface_that_leads_to_the_master(case: str, monkeypatch: pytest.MonkeyPatch):
    master, several_hosts, given, chosen = CHOSEN[case]
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    towards = {"10.7.0.1": "10.7.0.1", "127.0.1.1": "127.0.0.1", "192.0.2.9": "192.0.2.77"}
    monkeypatch.setattr(network, "own_address_towards", towards.__getitem__)
    before = dict(os.environ)

    def fail_inside() -> None:
        with network.chosen_interface(master, several_hosts):
            assert dict(os.environ) == {**before, **chosen}
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail_inside()
    assert dict(os.environ) == before


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("several_hosts", [False, True])
def test_interface_that_is_not_here_is_told_before_gloo_fails(several_hosts: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0,wlan0,down")
    message = (
        "environment variable GLOO_SOCKET_IFNAME (eth0,wlan0,down): host here has no interface wlan0, down with an "
        "address: set it to one of eth0, eth1, lo, or unset it"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"), network.chosen_interface("host1", several_hosts):
        pass
