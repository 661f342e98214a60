"""torchrun's plug-in: hosts find each other, on one address only; what is wrong is said in one line.

Two hosts are two handlers in this process, each of which is told which address is its own.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from importlib.metadata import entry_points

import psutil
import pytest
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    dynamic_rendezvous,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from distmoe.parallel import network, rendezvous

FIRST, SECOND = "127.0.0.2", "127.0.0.3"
SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"

Open = Callable[..., RendezvousHandler]


def parameters(endpoint: str, hosts: tuple[int, int], **conf: str) -> RendezvousParameters:
    """As torchrun makes them of ``--rdzv-backend distmoe --rdzv-endpoint ... --nnodes ... --rdzv-conf ...``."""
    return RendezvousParameters("distmoe", endpoint, "run", *hosts, **conf)


@pytest.fixture(autouse=True)
def no_naps(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch looks only once a second who has come."""
    monkeypatch.setattr(dynamic_rendezvous, "_delay", lambda seconds: time.sleep(0.01))


@pytest.fixture
def port() -> int:
    """One that is free."""
    with socket.create_server((FIRST, 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def open_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """``open_on(host, params)`` is torchrun's handler there."""
    opened: list[RendezvousHandler] = []

    def handler(address: str, params: RendezvousParameters) -> RendezvousHandler:
        monkeypatch.setattr(rendezvous, "interfaces", lambda: {address: "eth0"})
        monkeypatch.setattr(rendezvous, "own_address_towards", lambda other: address)
        for module in (rendezvous, network):
            monkeypatch.setattr(module, "is_loopback", lambda other: other not in (FIRST, SECOND))
        opened.append(get_rendezvous_handler(params))
        return opened[-1]

    monkeypatch.setenv(SHARED_STORE, "")  # to be put back
    del os.environ[SHARED_STORE]
    yield handler
    for one in opened:
        one.shutdown()


def round_of(*handlers: RendezvousHandler) -> list[RendezvousInfo]:
    """What torchrun gets on each host, by rank."""
    with ThreadPoolExecutor(len(handlers)) as threads:
        joined = [threads.submit(one.next_rendezvous) for one in handlers]
        return sorted((one.result(timeout=30) for one in joined), key=lambda info: info.rank)


def masters(infos: list[RendezvousInfo]) -> set[tuple[str, int]]:
    stores = [info.bootstrap_store_info for info in infos]
    return {(store.master_addr, store.master_port) for store in stores if store is not None}


def listening(port: int) -> list[str]:
    """The addresses on which this process listens at a port."""
    found = psutil.Process().net_connections("tcp")
    return [one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN and one.laddr.port == port]


def test_torchrun_knows_the_plug_in():
    assert entry_points(group="torchrun.handlers")["distmoe"].load()() is rendezvous.create_handler


def test_two_hosts_meet_on_the_address_of_the_endpoint(open_on: Open, port: int):
    endpoint = f"{FIRST}:{port}"
    first, second = (open_on(host, parameters(endpoint, (2, 2))) for host in (FIRST, SECOND))
    assert listening(port) == [FIRST]
    infos = round_of(first, second)
    assert [(info.rank, info.world_size) for info in infos] == [(0, 2), (1, 2)]
    infos[0].store.set("key", "value")
    assert infos[1].store.get("key") == b"value"
    # Workers serve a store of their own, on an address of the host of rank 0.
    (master,) = masters(infos)
    assert master[0] in (FIRST, SECOND)
    assert master[1] != port
    assert (first.get_backend(), first.get_run_id()) == ("distmoe", "run")
    assert not first.use_agent_store


def test_host_that_joins_later_is_taken_in(open_on: Open, port: int):
    # A short read_timeout: with torch's own store for all rounds the newcomer waits for an address for that long.
    conf = {"read_timeout": "3", "join_timeout": "30"}
    first = open_on(FIRST, parameters(f"{FIRST}:{port}", (1, 2), last_call_timeout="1", **conf))
    (alone,) = round_of(first)
    assert (alone.rank, alone.world_size) == (0, 1)
    second = open_on(SECOND, parameters(f"{FIRST}:{port}", (1, 2), last_call_timeout="30", **conf))
    with ThreadPoolExecutor(1) as threads:
        newcomer = threads.submit(second.next_rendezvous)
        joined = alone
        while joined.world_size == 1:  # as torchrun does
            assert not newcomer.done()
            if first.num_nodes_waiting() > 0:
                joined = first.next_rendezvous()
        infos = [joined, newcomer.result(timeout=30)]
    assert sorted((info.rank, info.world_size) for info in infos) == [(0, 2), (1, 2)]
    assert len(masters(infos)) == 1
    assert masters(infos) != masters([alone])


def test_hosts_of_fixed_ranks_share_the_store_of_the_first(open_on: Open, port: int):
    endpoint = f"{FIRST}:{port}"
    first, second = (
        open_on(host, parameters(endpoint, (2, 2), rank=rank)) for host, rank in ((FIRST, "0"), (SECOND, "1"))
    )
    assert listening(port) == [FIRST]
    for _ in range(2):  # torchrun asks again when it starts its workers again
        infos = round_of(second, first)
        assert [(info.rank, info.world_size) for info in infos] == [(0, 2), (1, 2)]
        assert masters(infos) == {(FIRST, port)}
    infos[1].store.set("key", "value")
    assert infos[0].store.get("key") == b"value"
    assert (second.get_backend(), second.get_run_id()) == ("distmoe", "run")
    assert (second.use_agent_store, second.num_nodes_waiting(), second.is_closed()) == (True, 0, False)


def test_ranks_are_fixed_whoever_has_the_endpoints_address(open_on: Open, port: int):
    # Addresses may be moved between hosts, or both may have one: the rank says who serves.
    endpoint = f"{FIRST}:{port}"
    open_on(FIRST, parameters(endpoint, (2, 2), rank="0"))
    open_on(FIRST, parameters(endpoint, (2, 2), rank="1"))
    assert listening(port) == [FIRST]


def test_host_of_a_fixed_rank_that_does_not_come_is_named(open_on: Open, port: int, capsys: pytest.CaptureFixture[str]):
    endpoint = f"{FIRST}:{port}"
    first = open_on(FIRST, parameters(endpoint, (3, 3), rank="0", join_timeout="1"))
    third = open_on(SECOND, parameters(endpoint, (3, 3), rank="2"))
    with ThreadPoolExecutor(1) as threads:
        waits = threads.submit(third.next_rendezvous)
        with pytest.raises(SystemExit, match="2"):
            first.next_rendezvous()
        assert capsys.readouterr().err == (
            f"distmoe: error: only 2 of 3 hosts have come to rendezvous endpoint ({endpoint}) within 1 s; rank 1 has "
            "not: start all of them, each with a rank of its own, or raise join_timeout in --rdzv-conf\n"
        )
        second = open_on(SECOND, parameters(endpoint, (3, 3), rank="1"))
        assert [second.next_rendezvous().rank, waits.result(timeout=30).rank] == [1, 2]


@pytest.mark.parametrize("endpoint", ["", FIRST])
def test_runs_of_one_host_need_neither_ports_nor_a_network(endpoint: str):
    """Where accelerate gives no endpoint, or the host's own name is a loopback address that no interface has."""
    handlers = [rendezvous.create_handler(parameters(endpoint, (1, 1))) for _ in range(2)]  # of runs side by side
    for handler in handlers:
        (info,) = round_of(handler)
        handler.shutdown()
        assert (info.rank, info.world_size) == (0, 1)
        assert {address for address, _ in masters([info])} == {endpoint or "127.0.0.1"}


HERE = f"{FIRST}:PORT"
LOOPBACK = "which others do not reach: give the host's address in the network instead"
# Endpoint (PORT is a free port, TAKEN another program's), hosts, --rdzv-conf, and what is said.
REFUSED: dict[str, tuple[str, tuple[int, int], dict[str, str], str]] = {
    "rank is no number": (HERE, (2, 2), {"rank": "x"}, "rank (x) in --rdzv-conf must be a whole number from 0 to 1:"),
    "negative rank": (HERE, (2, 2), {"rank": "-1"}, "rank (-1) in --rdzv-conf must be a whole number from 0 to 1:"),
    "rank outside": (HERE, (2, 2), {"rank": "2"}, "rank (2) in --rdzv-conf must be a whole number from 0 to 1:"),
    "rank of one host": (HERE, (1, 1), {"rank": "1"}, "rank (1) in --rdzv-conf must be a whole number from 0 to 0:"),
    "rank in an open world": (HERE, (1, 2), {"rank": "0"}, "fixes the hosts, and --nnodes (1:2) leaves them open"),
    "no time": (HERE, (2, 2), {"read_timeout": "0"}, "read_timeout (0) in --rdzv-conf must be a whole number of"),
    "words for a time": (HERE, (2, 2), {"join_timeout": "soon"}, "join_timeout (soon) in --rdzv-conf must be a"),
    "a setting of torch": (HERE, (2, 2), {"last_call_timeout": "x"}, "option 'last_call_timeout' does not"),
    "unknown name": ("no.such.host.invalid:PORT", (2, 2), {}, "rendezvous endpoint (no.such.host.invalid): host"),
    "no name": ("a..b:PORT", (2, 2), {}, "rendezvous endpoint (a..b): host"),
    "words for a port": (f"{FIRST}:http", (2, 2), {}, f"rendezvous endpoint '{FIRST}:http' must be an integer"),
    "any port, for others": (f"{FIRST}:0", (2, 2), {}, f"endpoint ({FIRST}:0): other hosts would not know port 0"),
    "no endpoint, for others": ("", (2, 2), {}, "rendezvous endpoint (localhost) is a loopback address on host"),
    "loopback for others": ("127.0.0.1:PORT", (1, 2), {}, LOOPBACK),
    "loopback of rank 0": ("localhost:PORT", (2, 2), {"rank": "0"}, LOOPBACK),
    "loopback of rank 1": ("127.0.0.1:PORT", (2, 2), {"rank": "1"}, "(127.0.0.1) is a loopback address here ("),
    "all addresses": ("0.0.0.0:PORT", (1, 1), {}, "(0.0.0.0) stands for all addresses of a host"),
    "taken port": (f"{FIRST}:TAKEN", (2, 2), {}, "the port is taken by another program: choose a free one"),
    "another host's address": ("203.0.113.7:PORT", (2, 2), {"rank": "0"}, "203.0.113.7 is not an address of host"),
    "another host's, for one": ("203.0.113.7:PORT", (1, 1), {}, "203.0.113.7 is not an address of host"),
    "nobody": (f"{SECOND}:PORT", (2, 2), {"read_timeout": "1"}, "nobody serves it for 1 s (Connection refused): start"),
    "no store": (f"{FIRST}:TAKEN", (2, 2), {"rank": "1", "read_timeout": "1"}, "listens there is no store (Ping"),
}  # fmt: skip


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another program has, which greets whoever connects."""
    with socket.create_server((FIRST, 0)) as server, ThreadPoolExecutor(1) as threads:

        def greet() -> None:
            with suppress(OSError), ExitStack() as connected:
                while True:
                    connected.enter_context(server.accept()[0]).sendall(b"SSH-2.0-OpenSSH\r\n")

        threads.submit(greet)
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)  # ends the waiting for others


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_ends_the_process_with_one_message(
    case: str, port: int, taken: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    endpoint, hosts, conf, message = REFUSED[case]
    given = endpoint.replace("PORT", str(port)).replace("TAKEN", str(taken))
    loopback = not given.startswith((FIRST, SECOND))
    monkeypatch.setattr(rendezvous, "interfaces", lambda: {FIRST: "eth0"})
    for module in (rendezvous, network):
        monkeypatch.setattr(module, "is_loopback", lambda address: loopback and address.startswith("127."))
    with pytest.raises(SystemExit, match="2"):
        get_rendezvous_handler(parameters(given, hosts, **conf))
    *others, line = capfd.readouterr().err.splitlines()
    assert line.startswith("distmoe: error: ")
    assert message in line
    assert others == [] or case == "no store"  # of which torch itself says more
