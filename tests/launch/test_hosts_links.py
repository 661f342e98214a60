"""A fault of a link between imitated hosts does what its name says, no more, and ends when it is healed."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.hosts import Host, Hosts, why_not
from tests.launch.links import why_no_delay
from tests.launch.traffic import measure, program, start

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def module_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if reason := why_not("iptables", "tc"):
        pytest.skip(reason)
    with Hosts(3, tmp_path_factory.mktemp("hosts")) as three:
        start(three[1], "echo", three.folder / "echo")
        yield three


@pytest.fixture
def hosts(module_hosts: Hosts) -> Iterator[Hosts]:
    """Three hosts with whole links, an echo on host2."""
    yield module_hosts
    for host in module_hosts:
        host.link.heal()


def test_link_down_blocks_and_up_heals(hosts: Hosts, tmp_path: Path):
    talk = start(hosts[0], "talk", tmp_path / "talk", "host2", "10")
    hosts[1].link.down()
    time.sleep(0.1)  # what was under way has arrived
    num_answers = talk.read_log().count("answered")
    assert not reaches_host2(hosts[2])
    assert talk.read_log().count("answered") <= num_answers + 1  # one that it had got and not yet told of
    hosts[1].link.up()
    talk.wait_for(f"(answered\n){{{num_answers + 20}}}", timeout=5)  # the same connection goes on
    talk.kill()


def reaches_host2(host: Host) -> bool:
    """Whether a host can connect to the echo within half a second."""
    connect = "import socket; socket.create_connection(('host2', 7000), timeout=0.5)"
    return host.run(["python", "-Ic", connect], check=False).returncode == 0


def test_connections_are_reset_and_new_ones_are_made(hosts: Hosts, tmp_path: Path):
    talk = start(hosts[0], "talk", tmp_path / "talk", "host2", "10")
    assert hosts[0].link.reset_connections(hosts[2].address) == 0
    assert hosts[0].link.reset_connections(hosts[1].address) == 1
    assert talk.wait_for("broke .*", timeout=5).split()[1] in ("ConnectionAbortedError", "ConnectionResetError")
    assert measure(hosts[0], "round_trip", "host2") < 0.1


@pytest.mark.parametrize(("probability", "least", "most"), [(0.0, 1000, 1000), (0.5, 400, 600)])
def test_loss(hosts: Hosts, tmp_path: Path, probability: float, least: int, most: int):
    # The number that arrives is binomial with a standard deviation of 16 at 0.5: a false alarm once in a billion runs.
    hosts[1].link.drop(probability)
    count = start(hosts[1], "count", tmp_path / "count")
    hosts[0].run(program("send", "host2"))
    assert least <= int(count.wait_for(r"counted \d+").split()[1]) <= most


def test_rate_limit_holds_each_way_and_ends(hosts: Hosts, tmp_path: Path):
    sinks = [start(host, "sink", tmp_path / host.name) for host in (hosts[0], hosts[1])]

    def times() -> tuple[float, float]:
        return measure(hosts[0], "push", "host2", "2"), measure(hosts[1], "push", "host1", "2")

    assert max(times()) < 0.2
    hosts[0].link.limit_rate(50)
    # 2 MB take 0.32 s at 50 Mbit/s, less what the bucket holds at first, more for headers and what is sent again.
    limited = times()
    assert min(limited) > 0.28
    assert max(limited) < 1.5
    hosts[0].link.limit_rate(None)
    assert max(times()) < 0.2
    for sink in sinks:
        sink.kill()


def test_delay_is_added_each_way_and_data_stay_whole(hosts: Hosts):
    if reason := why_no_delay():
        pytest.skip(reason)
    assert measure(hosts[0], "round_trip", "host2") < 0.02
    hosts[1].link.delay(0.03)
    assert 0.06 <= measure(hosts[0], "round_trip", "host2") < 0.16
    measure(hosts[0], "transfer", "host2", "0.5")
    hosts[1].link.delay(0.01)
    assert 0.02 <= measure(hosts[0], "round_trip", "host2") < 0.06
    hosts[1].link.delay(0)
    assert measure(hosts[0], "round_trip", "host2") < 0.02
