"""Imitated hosts are apart, know one another, lose and regain their power, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY
from tests.launch.hosts import Hosts, Listener, why_not
from tests.launch.links import why_no_delay
from tests.launch.traffic import measure, start

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("hosts")
    before = held_networks()
    with Hosts(3, folder) as three:
        networks = held_networks() - before
        yield three
        assert len(networks) == 4  # of three hosts and the switch; no test leaves one of a former boot open
    assert held_networks() == before
    assert_nothing_is_left(networks, folder)


def held_networks() -> set[str]:
    """Network namespaces that descriptors of this process keep alive."""
    descriptors = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    targets = [os.readlink(path) for path in descriptors if path.is_symlink()]
    return {target for target in targets if target.startswith("net:")}


def network_of(pid: int) -> str | None:
    """The network namespace of a process, or None if there is no such process."""
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return None


def assert_nothing_is_left(networks: set[str], folder: Path) -> None:
    """No process in these networks, nothing mounted from or in this folder, nothing in this process's own network."""
    assert [psutil.Process(pid).cmdline() for pid in psutil.pids() if network_of(pid) in networks] == []
    assert str(folder) not in Path("/proc/self/mountinfo").read_text()
    assert not {"host1", "host1-slow", "switch"} & set(os.listdir("/sys/class/net"))


def test_hosts_are_apart_and_know_one_another(hosts: Hosts, tmp_path: Path):
    assert [host.run(["hostname"]).stdout for host in hosts] == ["host1\n", "host2\n", "host3\n"]
    for host in hosts:
        host.run(["sh", "-c", "hostname >/dev/shm/mine; hostname >/run/mine"])
    names = " ".join([*(host.name for host in hosts), "host4"])
    look = (
        f"cat /dev/shm/mine /run/mine /proc/sys/net/ipv4/tcp_retries2; for name in {names}; do getent hosts $name; done"
    )
    table = [f"{host.address} {host.name}" for host in hosts]  # host4 is unknown
    for host in hosts:
        lines = [" ".join(line.split()) for line in host.run(["sh", "-c", look], check=False).stdout.splitlines()]
        assert lines == [host.name, host.name, "5", *table]
    sleeper = hosts[1].popen(["sleep", "60.25"], log=tmp_path / "log")
    assert [host.pids(r"^sleep 60\.25") for host in hosts] == [[], [sleeper.program_pid()], []]
    assert hosts[0].run(["pgrep", "sleep"], check=False).stdout == ""
    assert hosts[1].run(["pgrep", "--count", "sleep"]).stdout == "1\n"
    sleeper.terminate()
    assert sleeper.wait(5) == -signal.SIGTERM


def test_command_gets_environment_and_folder_and_its_failure_raises(hosts: Hosts, tmp_path: Path):
    shell = ["sh", "-c", "echo $GREETING in $PWD; command -v python"]
    output = hosts[2].run(shell, env={"GREETING": "hello"}, cwd=tmp_path).stdout
    assert output == f"hello in {tmp_path}\n{Path(sys.executable).with_name('python')}\n"
    with pytest.raises(RuntimeError, match=r"host3: sh -c .* ended with 3\nso it is"):
        hosts[2].run(["sh", "-c", "echo so it is >&2; exit 3"])
    begin = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        hosts[2].run(["sh", "-c", "sleep 60.5 & wait"], timeout=0.1)
    assert time.monotonic() - begin < 5
    assert hosts[2].pids("sleep") == []  # nothing of it goes on


def test_signals_reach_the_program(hosts: Hosts, tmp_path: Path):
    handler = "signal.signal(signal.SIGUSR1, lambda *_: print('got it', flush=True))"
    endless = f"import signal, time\n{handler}\nprint('ready', flush=True)\nwhile True: time.sleep(0.01)"
    process = hosts[0].popen(["python", "-Ic", endless], log=tmp_path / "log")
    process.wait_for("ready")
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGUSR1)
    with pytest.raises(AssertionError, match=r"no 'got it' in 0.3 s:\nready"):
        process.wait_for("got it", timeout=0.3)
    process.send_signal(signal.SIGCONT)
    process.wait_for("got it", timeout=5)
    process.send_signal(signal.SIGSTOP)
    process.kill()
    assert process.wait(5) == -signal.SIGKILL
    with pytest.raises(AssertionError, match=r"ended with -9 before 'more':\nready\ngot it"):
        process.wait_for("more")
    for number in (
        signal.SIGPIPE,
        signal.SIGINT,
        signal.SIGSEGV,
    ):  # those that Python treats in its own way, and others
        assert hosts[0].run(["sh", "-c", f"kill -{number} $$"], check=False).returncode == -number


def test_program_that_is_not_there_is_named(hosts: Hosts, tmp_path: Path):
    for name in ("no-such-program", "nor-this"):  # the log of the second begins where that of the first ends
        process = hosts[0].popen([name], log=tmp_path / "log")
        assert process.wait(5) == 127
        assert process.read_log() == f"{name} in {Path.cwd()}: No such file or directory\n"


def test_process_whose_parent_died_is_buried(hosts: Hosts):
    first = psutil.Process(hosts[0].first)
    hosts[0].run(["sh", "-c", "sleep 0.1 &"])  # ends when the pipe is closed that the sleeper has inherited
    give_up = time.monotonic() + 5
    while first.children():
        assert time.monotonic() < give_up, first.children()
        time.sleep(0.01)


def test_listening_names_address_port_and_program(hosts: Hosts, tmp_path: Path):
    echo = start(hosts[1], "echo", tmp_path / "echo")
    assert hosts[1].listening() == {Listener("10.77.0.2", 7000, "python")}
    assert hosts[0].listening() == set()
    echo.kill()


def test_own_storage(hosts: Hosts, tmp_path: Path):
    folder = tmp_path / "own"
    hosts[0].mount_tmpfs(folder, "1m")
    fill = hosts[0].run(["dd", "if=/dev/zero", f"of={folder}/file", "bs=1024", "count=2048"], check=False)
    assert "No space left on device" in fill.stderr
    assert hosts[0].run(["stat", "-c", "%s", folder / "file"]).stdout == f"{1 << 20}\n"
    assert list(folder.iterdir()) == []
    assert hosts[1].run(["ls", folder]).stdout == ""


def test_power_failure_breaks_connections_and_power_returns(hosts: Hosts, tmp_path: Path):
    echo = start(hosts[1], "echo", tmp_path / "echo")
    stopped = hosts[1].popen(["sleep", "60"], log=tmp_path / "stopped")
    stopped.send_signal(signal.SIGSTOP)
    talk = start(hosts[0], "talk", tmp_path / "talk", "host2", "20")
    hosts[1].kill()
    assert (echo.returncode, stopped.returncode) == (-signal.SIGKILL, -signal.SIGKILL)
    _, error, *_, silence_s = talk.wait_for("broke .*", timeout=5).split()
    assert error in ("ConnectionResetError", "ConnectionError")
    assert float(silence_s) < 1
    assert not hosts[1].is_up
    with pytest.raises(RuntimeError, match="host2 is off"):
        hosts[1].run(["true"])

    started = []
    hosts.at_boot(lambda host: started.append(host.name))
    assert started == ["host1", "host3"]
    hosts[1].boot()
    hosts.starts.clear()
    assert started == ["host1", "host3", "host2"]
    with pytest.raises(RuntimeError, match="host2 is up"):
        hosts[1].boot()
    echo = start(hosts[1], "echo", tmp_path / "echo again")
    assert measure(hosts[0], "round_trip", "host2") < 0.1
    echo.kill()


def test_silent_power_failure_is_not_noticed(hosts: Hosts, tmp_path: Path):
    start(hosts[1], "echo", tmp_path / "echo")
    talk = start(hosts[0], "talk", tmp_path / "talk", "host2", "0.5")
    hosts[1].kill(silently=True)
    _, error, *_, silence_s = talk.wait_for("broke .*", timeout=5).split()
    assert error == "TimeoutError"
    assert float(silence_s) >= 0.5
    hosts[1].boot()


def test_hosts_end_with_the_process_that_made_them(tmp_path: Path):
    # Killed, it cannot clean up: the hosts have to go by themselves.
    if reason := why_not():
        pytest.skip(reason)
    code = """
        import pathlib, signal, sys, time
        from tests.launch.hosts import Hosts
        from tests.launch.links import why_no_delay
        folder = pathlib.Path(sys.argv[1])
        hosts = Hosts(2, folder)
        if why_no_delay() is None:
            hosts[0].link.delay(0.01)
        hosts[0].popen(["sleep", "60"], log=folder / "log").send_signal(signal.SIGSTOP)
        hosts[1].mount_tmpfs(folder / "own", "1m")
        print(hosts.switch.identity, *(host.link.network.identity for host in hosts), flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        networks = set(process.stdout.readline().split())
        inside = [psutil.Process(pid) for pid in psutil.pids() if network_of(pid) in networks]
        process.kill()
    assert len(networks) == 3
    assert len(inside) == 6 + (why_no_delay() is None)  # two of either host, the sleeper and what waits, the slow link
    assert psutil.wait_procs(inside, timeout=5)[1] == []
    assert_nothing_is_left(networks, tmp_path)


def test_failed_boot_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if reason := why_not():
        pytest.skip(reason)
    before = held_networks()
    monkeypatch.setattr("tests.launch.hosts.SHARED_MEMORY", "nonsense")
    with pytest.raises(RuntimeError, match=r"host1 did not boot: mount: .*/dev/shm"):
        Hosts(2, tmp_path)
    assert held_networks() == before


def test_missing_program_is_a_reason():
    reason = why_not("no-such-program")
    assert reason is not None
    assert "Linux and root" in reason or "need no-such-program" in reason
