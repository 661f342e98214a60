"""Several hosts imitated on this machine, for tests of what happens between hosts and when one of them fails.

A host has its own network, host name, process table, System V IPC, ``/dev/shm``, ``/run`` and name resolution (Linux
namespaces). Killing its process 1 is a power failure: every process of it is gone, and its peers' connections break.
Hosts share the processors, the memory, the clock, the users and, but for the folders just named, the file system, as a
cluster with shared storage does; :meth:`Host.mount_tmpfs` gives a host storage that the others do not see. They reach
one another and nothing else, and nothing but :meth:`Host.run` reaches them.

Process 1 ends when its standard input does, and that is a pipe from this process; networks are held by descriptors of
this process (``links.py``). So hosts, with their processes, mounts and networks, end with the process that made them,
however it ends, and two test sessions never meet.
"""

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import psutil

from tests.launch.links import Link, Switch
from tests.launch.processes import COMMAND_S, EXECUTABLES, Process, environment, process_table

NETWORK = "10.77.0"  # the first three numbers of the hosts' addresses
SHARED_MEMORY = "512m"
PROGRAMS = ("ip", "mount", "nsenter", "ss", "unshare")

# Run by process 1 of a host, in its namespaces: name of the host, folder of its files.
BOOT = """
echo "$1" >/proc/sys/kernel/hostname
echo 5 >/proc/sys/net/ipv4/tcp_retries2  # TCP gives a silent peer up after seconds, not after a quarter of an hour
echo 1 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6  # what links.py does to IPv4 packets is all there is
mount -t tmpfs -o size="$3" tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
# /sys shows the interfaces of the network in which it was mounted. A new one lacks the control groups.
mkdir /run/cgroup
mount --rbind /sys/fs/cgroup /run/cgroup
mount -t sysfs sysfs /sys
mount --move /run/cgroup /sys/fs/cgroup
rmdir /run/cgroup
echo up
exec env --ignore-signal=CHLD cat >/dev/null  # the kernel buries processes whose parent has died
"""
# No name server: a name that is not in /etc/hosts is unknown at once, whatever the machine's own settings.
NAME_SERVICES = "passwd: files\ngroup: files\nshadow: files\nhosts: files\n"


@functools.cache
def why_not(*programs: str) -> str | None:
    """The reason why hosts cannot be imitated here, or None if they can.

    Args:
        programs: Further ones that a test needs.
    """
    if sys.platform != "linux" or os.geteuid() != 0:
        return "several hosts on one machine need Linux and root"
    missing = [program for program in PROGRAMS + programs if shutil.which(program, path=EXECUTABLES) is None]
    if missing:
        return f"several hosts on one machine need {', '.join(missing)}"
    probe = "ip link add probe type veth && ip link add switch type bridge && mount -t tmpfs tmpfs /run"
    command = ["unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--mount-proc", "sh", "-ec", probe]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else None


class Listener(NamedTuple):
    """A TCP socket that waits for connections, and the program that holds it."""

    address: str
    port: int
    program: str


class Host:
    """One host; made and booted by :class:`Hosts`.

    Attributes:
        name: Host name, which all hosts resolve.
        address: IPv4 address.
    """

    def __init__(self, hosts: "Hosts", number: int) -> None:
        self.name = f"host{number}"
        self.address = f"{NETWORK}.{number}"
        self._hosts = hosts
        self._link: Link | None = None
        self._boot: subprocess.Popen[bytes] | None = None  # the parent of process 1
        self._first = 0  # process 1, as seen from outside; 0: it is not known to run
        self._processes: list[Process] = []

    @property
    def is_up(self) -> bool:
        """Whether the power is on."""
        return self._boot is not None and self._boot.poll() is None

    @property
    def first(self) -> int:
        """Process 1, as seen from outside.

        Raises:
            RuntimeError: The power is off.
        """
        if not self.is_up:
            raise RuntimeError(f"{self.name} is off")
        return self._first

    @property
    def link(self) -> Link:
        """Its network interface and the cable to the switch; a new, whole one after every boot."""
        assert self._link is not None, f"{self.name} was never up"
        return self._link

    def boot(self) -> None:
        """Turns the power on: a new network, nothing mounted, then what :meth:`Hosts.at_boot` was given.

        Raises:
            RuntimeError: It is on, or the host did not come up; the message says why.
        """
        if self.is_up:
            raise RuntimeError(f"{self.name} is up")
        self.close()
        self._link = Link(self._hosts.switch, self.name, self.address, lambda command: self.run(command).stdout)
        own = ("--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc")
        first = ("sh", "-euc", BOOT, "boot", self.name, str(self._hosts.folder), SHARED_MEMORY)
        log = self._hosts.folder / f"{self.name}.boot"
        with log.open("wb") as errors:
            self._boot = subprocess.Popen(
                self._link.network.enter("unshare", *own, *first),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment(),
                start_new_session=True,  # Ctrl-C is for this process, which then ends its hosts
            )
        assert self._boot.stdout is not None
        if self._boot.stdout.readline() != b"up\n":
            self.kill()
            raise RuntimeError(f"{self.name} did not boot: {log.read_text()}")
        self._first = psutil.Process(self._boot.pid).children()[0].pid
        for start in self._hosts.starts:
            start(self)

    def kill(self, *, silently: bool = False) -> None:
        """Turns the power off: all its processes die at once. Does nothing when it is off.

        Args:
            silently: Its peers are not told. Otherwise their connections are closed or reset, as when the processes
                alone die.
        """
        if self._boot is None:
            return
        if silently:
            self.link.down()
        # Process 1 also ends at the end of its input. It is gone only when all others of its process table are.
        with self._boot:
            if self._first and self.is_up:
                os.kill(self._first, signal.SIGKILL)
        self._boot, self._first = None, 0
        for process in self._processes:
            process.wait()
        self._processes.clear()

    def close(self) -> None:
        """Turns the power off and removes what a host that is off leaves: a network that still answers its peers."""
        self.kill()
        if self._link is not None:
            self._link.close()

    def run(
        self,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = COMMAND_S,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program on this host to its end.

        Args:
            command: Program and arguments. The folder of this Python comes first in ``PATH``.
            env: Added to this process's environment.
            cwd: Working directory; None: this process's.
            timeout: Seconds.
            check: Whether an exit code other than 0 raises.

        Raises:
            RuntimeError: The exit code is not 0; the message holds the output. Or the power is off.
            subprocess.TimeoutExpired: It took too long; it and its group are killed.
        """
        with Process(self.first, command, env=env, cwd=cwd) as process:
            try:
                stdout, stderr = process.communicate(timeout=timeout)
            except BaseException:
                process.signal_group(signal.SIGKILL)
                raise
        if check and process.returncode:
            line = " ".join(map(str, command))
            raise RuntimeError(f"{self.name}: {line} ended with {process.returncode}\n{stdout}{stderr}")
        return subprocess.CompletedProcess(list(map(str, command)), process.returncode, stdout, stderr)

    def popen(
        self,
        command: Sequence[str | Path],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Process:
        """Starts a program on this host, which dies with it at the latest.

        Args:
            command: As for :meth:`run`.
            log: What it writes is appended to this file, standard output and errors alike.
            env: As for :meth:`run`.
            cwd: As for :meth:`run`.
        """
        process = Process(self.first, command, env=env, cwd=cwd, log=log)
        self._processes.append(process)
        return process

    def pids(self, pattern: str = "") -> list[int]:
        """Ids of this host's processes whose command line has a match of ``pattern``, but for process 1.

        The ids are those seen from outside, which ``os.kill`` takes.
        """
        table = process_table(self.first)
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or [])  # a process that has ended has none
            if process.pid != self._first and line and re.search(pattern, line):
                found.append(process.pid)
        return [pid for pid in found if process_table(pid) == table]

    def listening(self) -> set[Listener]:
        """The TCP sockets of this host that wait for connections; address ``*`` or ``0.0.0.0`` is every address."""
        lines = self.run(["ss", "--listening", "--tcp", "--numeric", "--processes", "--no-header"]).stdout.splitlines()
        listeners = set()
        for _, _, _, local, _, *users in map(str.split, lines):
            address, _, port = local.rpartition(":")
            program = re.search(r'"([^"]+)"', users[0]) if users else None
            listeners.add(Listener(address.strip("[]"), int(port), program.group(1) if program else ""))
        return listeners

    def mount_tmpfs(self, path: Path, size: str) -> None:
        """Mounts an empty file system over the folder ``path``, which other hosts do not see; it ends with the host.

        Args:
            path: Made if it is not there; all hosts see the folder itself.
            size: Such as ``20m``.
        """
        path.mkdir(parents=True, exist_ok=True)
        self.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path])


class Hosts:
    """Hosts ``host1``, ``host2``, ... on one switch, as a context manager.

    Attributes:
        folder: Their files and logs.
        switch: To which their links lead.
        starts: What every host does when it has booted.
    """

    def __init__(self, num_hosts: int, folder: Path) -> None:
        """Boots the hosts.

        Args:
            num_hosts: 1 to 254.
            folder: For files and logs; it has to outlive the hosts.
        """
        self.folder = folder.resolve()
        self.starts: list[Callable[[Host], None]] = []
        self._hosts = [Host(self, number + 1) for number in range(num_hosts)]
        names = [f"{host.address} {host.name}\n" for host in self._hosts]
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))
        (self.folder / "nsswitch.conf").write_text(NAME_SERVICES)
        self.switch = Switch()
        try:
            for host in self._hosts:
                host.boot()
        except BaseException:
            self.close()
            raise

    def at_boot(self, start: Callable[[Host], None]) -> None:
        """Calls ``start(host)``, for example to start a daemon, for every host that is up and after every boot."""
        self.starts.append(start)
        for host in self._hosts:
            if host.is_up:
                start(host)

    def close(self) -> None:
        """Turns all hosts off and removes them and their network. May be called again."""
        with contextlib.ExitStack() as stack:  # one that fails does not keep the others
            stack.callback(self.switch.close)
            for host in self._hosts:
                stack.callback(host.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._hosts)

    def __getitem__(self, index: int) -> Host:
        return self._hosts[index]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts)
