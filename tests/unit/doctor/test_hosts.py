"""The hosts of a hostfile, behind an imitated ssh: one host for each fault."""

import errno
import importlib.metadata
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from distmoe.doctor import ssh
from distmoe.doctor.findings import Finding, fail, ok
from distmoe.doctor.hostfile import Hostfile
from distmoe.doctor.hosts import examine_hosts
from tests.unit.doctor.imitated_ssh import ImitatedHosts, imitate_hosts

SET_UP = "`bash launch/setup.sh`"
CLOCK = re.compile(r"[+-]\d+\.\d m?s \(\+-\d+\.\d ms\)")


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImitatedHosts:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    return imitate_hosts(tmp_path / "ssh", monkeypatch)


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def examined(port: int, names: str, run_dir: Path | None = None, slots: int = 1) -> list[Finding]:
    """The findings, with the figures of clocks and of free ports replaced."""
    found = examine_hosts(Hostfile(tuple(names.split()), slots), port, None, run_dir)
    shown = [CLOCK.sub("SKEW", one.found).replace(f"port {port}", "port P") for one in found]
    return [
        Finding(one.level, one.subject.replace(str(port), "P"), re.sub(r"port \d+", "port ANY", text), one.remedy)
        for one, text in zip(found, shown, strict=True)
    ]


def healthy(number: int) -> Finding:
    return ok(f"host{number}", f"10.99.0.{number}, ssh, versions as here, clock SKEW")


def test_hosts_that_fit_together(hosts: ImitatedHosts, port: int, tmp_path: Path):
    run_dir = tmp_path / "runs" / "deep"  # will be made inside what is there
    assert examined(port, "host1 host2 host3", run_dir) == [
        healthy(1),
        healthy(2),
        healthy(3),
        ok("connections", "2 other hosts reach host1 at port P and at any other"),
        ok("run.dir", f"{run_dir}: the same storage on 3 hosts"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["ssh"]  # nothing stays


def test_only_the_interpreter_and_a_fixed_line_are_sent(hosts: ImitatedHosts, port: int):
    examine_hosts(Hostfile(("host1",), 1), port, 2222, None)
    (command,) = hosts.commands()
    before, _, after = command.partition(" -- host1 ")
    assert before == (
        "-o BatchMode=yes -o ConnectTimeout=5 -o ClearAllForwardings=yes -o ForwardAgent=no -o ForwardX11=no "
        "-o RequestTTY=no -o EscapeChar=none -p 2222"
    )
    interpreter, option, line = shlex.split(after)
    assert (interpreter, option) == (sys.executable, "-c")
    assert re.fullmatch(r"import sys;sys\.path\[:\]=filter\(None,sys\.path\);exec\(sys\.stdin\.read\(\d+\)\)", line)


def test_path_of_the_interpreter_is_nothing_to_a_shell(
    hosts: ImitatedHosts, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    python = tmp_path / "a b'; touch $(pwd)" / "py`touch pwned`thon"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(python))
    assert examined(port, "host1")[0] == healthy(1)
    assert {path.name for path in tmp_path.iterdir()} == {"ssh", python.parent.name}


def test_every_fault_of_a_host_is_named_with_its_remedy(hosts: ImitatedHosts, port: int):
    said = {
        2: "root@host2: Permission denied (publickey).",
        3: "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
        4: "Host key verification failed.",
        5: "ssh: connect to host host5 port 22: Connection refused",
        6: "ssh: connect to host host6 port 22: Connection timed out",
        7: "something new",
    }
    for number, text in said.items():
        hosts.log_in(f"host{number}", f"printf '%s\\n' {shlex.quote(text)} >&2; exit 255")
    hosts.log_in("host8", "COMMAND='/nowhere/python -c 1'")
    hosts.log_in("host9", "exit 3")
    found = examined(port, "host1 host2 host3 host4 host5 host6 host7 host8 host9 unknown1")
    assert found[:7] == [
        healthy(1),
        fail(
            "host2",
            f"10.99.0.2, ssh: {said[2]}",
            "`ssh-copy-id host2`, until `ssh -o BatchMode=yes host2 true` works",
        ),
        fail(
            "host3",
            "10.99.0.3, ssh: Host key verification failed.",
            "the host has another key than before: if that is right, `ssh-keygen -R host3`",
        ),
        fail("host4", "10.99.0.4, ssh: Host key verification failed.", "`ssh host4` once by hand, to accept its key"),
        fail(
            "host5",
            "10.99.0.5, ssh: connect to host host5 port ANY: Connection refused",
            "start the ssh server on host5 (systemctl start ssh), or give its port: --ssh-port",
        ),
        fail(
            "host6",
            "10.99.0.6, ssh: connect to host host6 port ANY: Connection timed out",
            "see whether host6 is up, and whether a firewall lets port 22 through",
        ),
        fail("host7", "10.99.0.7, ssh: something new", "`ssh -v host7 true` says more"),
    ]
    assert found[7].subject == "host8"
    cannot = rf"10\.99\.0\.8, ssh: {re.escape(sys.executable)} cannot be run there \(.*not found\)"
    assert re.fullmatch(cannot, found[7].found)
    assert found[7].remedy == f"set it up at the same path: on host8, in the same folder, {SET_UP}"
    assert found[8:] == [
        fail("host9", "10.99.0.9, ssh: ssh ended with exit code 3", "`ssh -v host9 true` says more"),
        fail(
            "unknown1",
            "this name stands for no address here",
            "a line `ADDRESS unknown1` in /etc/hosts of every host, or in the name server",
        ),
        ok("port P", "free on host1"),
    ]


def test_host_whose_files_cannot_be_read(hosts: ImitatedHosts, port: int):
    hosts.python("host1", "import pathlib; pathlib.Path.rglob = lambda root, pattern: [root / 'absent.py']")
    assert examined(port, "host1")[0] == fail(
        "host1",
        "10.99.0.1, files of Python's packages cannot be read there: No such file or directory",
        f"make them readable: on host1, in the same folder, {SET_UP}",
    )


def test_more_hosts_than_this_one_can_talk_to(hosts: ImitatedHosts, port: int, monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("subprocess.Popen", refuse)
    assert examined(port, "host1")[0] == fail(
        "host1", "10.99.0.1, ssh cannot be started here: Too many open files", "ulimit -n 4096; ulimit -u 4096"
    )


def test_host_that_is_silent(hosts: ImitatedHosts, port: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ssh, "_FIRST_ANSWER_S", 0.5)
    hosts.log_in("host1", "exec sleep 60")
    assert examined(port, "host1")[0] == fail(
        "host1",
        "10.99.0.1, ssh: no answer within 0.5 s",
        "see how long `ssh host1 true` takes, and what the host does",
    )


TORCH = """
from importlib import metadata
real = metadata.version
metadata.version = lambda package: "2.0.1" if package == "torch" else real(package)
"""
CODE = """
import importlib.util
importlib.util.find_spec = lambda name: None
"""
CLOCK_AHEAD = "import time; real_time = time.time; time.time = lambda: real_time() + {seconds}"


def test_versions_and_clocks_that_differ(hosts: ImitatedHosts, port: int):
    hosts.python("host2", TORCH)
    hosts.python("host3", CODE)
    hosts.python("host4", CLOCK_AHEAD.format(seconds=5))
    hosts.python("host5", CLOCK_AHEAD.format(seconds=-100) + TORCH)
    hosts.log_in("host6", "echo Welcome to host6.")  # before the first answer
    found = examined(port, "host1 host2 host3 host4 host5 host6")
    assert [(one.level, one.subject) for one in found] == [
        ("ok", "host1"),
        ("fail", "host2"),
        ("fail", "host3"),
        ("warn", "host4"),
        ("fail", "host5"),
        ("fail", "host5"),
        ("ok", "host6"),
        ("ok", "connections"),
    ]
    torch = importlib.metadata.version("torch")
    assert found[1].found == f"has other versions than this host (in brackets): torch 2.0.1 ({torch})"
    assert found[1].remedy == f"bring both to one state: on host2, in the same folder, {SET_UP}"
    assert re.search(r": distmoe's code absent \([0-9a-f]{12}\)$", found[2].found)
    assert found[3].found.startswith("clock against this host's: SKEW; log lines")
    assert found[5].found.startswith("clock against this host's: SKEW; Slurm and Kerberos")


def refuse(where: str, condition: str, error: str) -> str:
    """Code that makes a function of another host's Python raise an OSError."""
    module, _, name = where.rpartition(".")
    return f"""
import {module} as module
real_function = module.{name}
def function(*arguments, **options):
    if {condition}:
        raise {error}
    return real_function(*arguments, **options)
module.{name} = function
"""


def test_connections_that_are_not_let_through(hosts: ImitatedHosts, port: int):
    refused = 'ConnectionRefusedError(111, "Connection refused")'
    unknown = 'socket.gaierror(socket.EAI_NONAME, "Name or service not known")'
    hosts.python("host2", refuse("socket.create_connection", "True", refused))
    hosts.python("host3", refuse("socket.create_connection", f"arguments[0][1] != {port}", refused))
    hosts.python("host4", refuse("socket.create_connection", "True", unknown))
    hosts.python("host5", "import socket, os; socket.create_connection = lambda *x, **y: os._exit(9)")
    assert examined(port, "host1 host2 host3 host4 host5 host6")[6:] == [
        fail(
            "host2",
            "cannot connect to host1, port P: Connection refused; port ANY: Connection refused",
            "see the firewall of host1, and what `getent hosts host1` says on host2",
        ),
        fail(
            "host3",
            "cannot connect to host1, port ANY: Connection refused",
            "let all ports from 1024 on through between the hosts: gloo and NCCL take any that is free",
        ),
        fail(
            "host4",
            "cannot connect to host1, port P: Name or service not known; port ANY: Name or service not known",
            "a line `10.99.0.1 host1` in /etc/hosts of host4",
        ),
        fail("host5", "connection to host1: ssh ended with exit code 9", "`ssh -v host5 true`"),
    ]


def test_port_that_is_taken_on_the_first_host(hosts: ImitatedHosts):
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        assert examined(port, "host1 host2")[2:] == [
            fail(
                "port P",
                "host1 cannot serve the store there: Address already in use",
                "--port PORT with a free one, also for the launcher",
            )
        ]


@pytest.mark.parametrize(
    ("resolved", "error"),
    [
        ("[(2, 1, 6, '', ('192.0.2.99', 0))]", "Cannot assign requested address"),  # another host's
        ("raised(socket.gaierror(-2, 'Name or service not known'))", "Name or service not known"),
    ],
)
def test_first_host_that_does_not_know_its_own_name(hosts: ImitatedHosts, port: int, resolved: str, error: str):
    raised = "def raised(error):\n    raise error\n"
    hosts.python("host1", f"{raised}socket.getaddrinfo = lambda *x, **y: {resolved}")
    assert examined(port, "host1 host2")[2:] == [
        fail(
            "port P",
            f"host1 cannot serve the store there: {error}",
            "in host1's /etc/hosts, give `host1` its address in the network",
        )
    ]


def test_first_host_that_takes_its_name_for_loopback(hosts: ImitatedHosts, port: int, monkeypatch: pytest.MonkeyPatch):
    hosts.python("host1", 'socket.getaddrinfo = lambda *x, **y: [(2, 1, 6, "", ("127.0.1.1", 0))]')
    found = "host1 takes its own name for 127.0.1.1, which no other host reaches"
    assert examined(port, "host1 host2")[2:] == [
        fail(
            "port P",
            found,
            "in host1's /etc/hosts, give `host1` its address in the network, or set GLOO_SOCKET_IFNAME to the "
            "interface with that address",
        )
    ]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert examined(port, "host1 host2")[2:] == [
        ok("port P", f"{found}; GLOO_SOCKET_IFNAME=eth0 decides instead, and connections were not tried")
    ]


def test_one_host_alone(hosts: ImitatedHosts, port: int, tmp_path: Path):
    assert examined(port, "host1", tmp_path) == [healthy(1), ok("port P", "free on host1")]


def test_first_host_that_does_not_answer(hosts: ImitatedHosts, port: int, tmp_path: Path):
    hosts.log_in("host1", "exit 1")
    found = examined(port, "host1 host2", tmp_path)
    assert [one.level for one in found] == ["fail", "ok", "fail"]
    assert found[2] == fail("connections and storage", "not looked at: host1 does not answer", "mend what is above")


def test_storage_that_is_not_shared(hosts: ImitatedHosts, port: int, tmp_path: Path):
    # The file that the first host writes is not there, or is another's.
    absent = 'FileNotFoundError(2, "No such file or directory")'
    hosts.python("host2", refuse("builtins.open", '".distmoe-doctor-" in str(arguments[0])', absent))
    hosts.python(
        "host3",
        "import builtins, io; real_open = builtins.open\n"
        'builtins.open = lambda *x, **y: io.StringIO("old") if ".distmoe-doctor-" in str(x[0]) else real_open(*x, **y)',
    )
    remedy = f"mount the same storage at {tmp_path} on all hosts, or set run.dir to a folder that they share"
    lacking = f"does not see what host1 writes to run.dir ({tmp_path}): checkpoints need storage that all share"
    assert examined(port, "host1 host2 host3 host4", tmp_path)[5:] == [
        fail("host2", lacking, remedy),
        fail("host3", lacking, remedy),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["ssh"]


def test_storage_that_the_first_host_cannot_write(hosts: ImitatedHosts, port: int, tmp_path: Path):
    full = 'OSError(28, "No space left on device")'
    hosts.python("host1", refuse("os.open", '".distmoe-doctor-" in str(arguments[0])', full))
    assert examined(port, "host1 host2", tmp_path)[3:] == [
        fail(
            "run.dir",
            f"host1 cannot write {tmp_path}: No space left on device",
            "make it writable there, and leave space on it; or set run.dir to another folder",
        )
    ]


def set_gpus(hosts: ImitatedHosts, host: str, number: int) -> None:
    hosts.python(
        host,
        "import os; real_list = os.listdir\n"
        f'os.listdir = lambda path: ["0"] * {number} if path == "/proc/driver/nvidia/gpus" else real_list(path)',
    )


def test_hosts_with_fewer_gpus_than_slots(hosts: ImitatedHosts, port: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for host, number in {"host1": 8, "host2": 4, "host3": 0}.items():
        set_gpus(hosts, host, number)
    assert examined(port, "host1 host2 host3", slots=8)[3:5] == [
        fail(
            "host2",
            "4 GPUs for 8 processes",
            "slots=4 in the hostfile, for all hosts; or CUDA_VISIBLE_DEVICES= to train on CPUs",
        ),
        fail(
            "GPUs",
            "none on host3, but some on the others",
            "install its driver, leave it out of the hostfile, or set CUDA_VISIBLE_DEVICES= to train on CPUs",
        ),
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert {one.level for one in examined(port, "host1 host2 host3", slots=8)} == {"ok"}


def test_no_ssh_here(monkeypatch: pytest.MonkeyPatch, port: int):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert examined(port, "host1") == [fail("ssh", "is not installed here", "apt-get install -y openssh-client")]


def test_probe_takes_everything_back_when_it_is_cut_off(tmp_path: Path, port: int):
    # As ssh runs it; its input ends without a word, as when the connection breaks.
    command = [sys.executable, "-c", f"import sys;exec(sys.stdin.read({len(ssh._PROBE)}))"]
    requests = [
        {"do": "write", "folder": str(tmp_path / "runs"), "name": "note", "text": "seen"},
        {"do": "read", "path": str(tmp_path / "note")},
        {"do": "read", "path": str(tmp_path / "absent")},
        {"do": "write", "folder": str(tmp_path), "name": "note", "text": "again"},
    ]
    done = subprocess.run(
        command,
        input=ssh._PROBE + "".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        check=True,
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTHON")},
    )
    answers = [json.loads(line.removeprefix("distmoe-doctor ")) for line in done.stdout.splitlines()]
    assert answers == [
        {"path": str(tmp_path / "note")},
        {"text": "seen"},
        {"text": None},
        {"error": "File exists"},  # it never writes over what is there
    ]
    assert list(tmp_path.iterdir()) == []
