"""The network between imitated hosts: a switch, a link from it to each host, and what can go wrong with a link.

Every network namespace here is anonymous: it is held by a file descriptor of this process and is gone with it, however
this process ends. Nothing gets a name on the machine, so two test sessions can use the same names and addresses.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.launch.processes import environment

PREFIX_BITS = 24
MTU_BYTES = 1500
SLOW_LINK = Path(__file__).with_name("slow_link.py")

Run = Callable[[list[str]], str]
"""Runs a command on the host whose link it is and returns its output."""


class NetworkNamespace:
    """A network of its own, as long as this object is open: empty but for a loopback interface.

    Attributes:
        path: Opens as the namespace.
        identity: Where ``/proc/PID/ns/net`` of a process in it leads.
        is_open: Whether it was not closed.
    """

    def __init__(self) -> None:
        # A namespace lives while a process or a descriptor refers to it: its maker ends only when it is held.
        command = ["unshare", "--net", "sh", "-c", "ip link set lo up && echo made && read -r _"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()) as maker:
            assert maker.stdout is not None
            if maker.stdout.readline() != b"made\n":
                raise RuntimeError("unshare --net made no network namespace")
            self._descriptor = os.open(f"/proc/{maker.pid}/ns/net", os.O_RDONLY)
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        self.identity = os.readlink(self.path)
        self.is_open = True

    def enter(self, *command: str) -> list[str]:
        """The command that runs ``command`` in this network, and in all else where this process is."""
        return ["nsenter", f"--net={self.path}", *command]

    def run(self, *command: str, stdin: str = "") -> None:
        """Runs a command in this network.

        Raises:
            RuntimeError: It failed; the message holds what it wrote.
        """
        done = subprocess.run(
            self.enter(*command), input=stdin, capture_output=True, text=True, env=environment(), check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}\n{stdin}")

    def ip(self, *commands: str) -> None:
        """Runs commands of the program ``ip``, such as ``link set eth0 up``, until one fails."""
        self.run("ip", "-batch", "-", stdin="\n".join(commands))

    def close(self) -> None:
        """Lets go of the network, once; the kernel removes it when no process is in it any more."""
        if self.is_open:
            os.close(self._descriptor)
            self.is_open = False


class Switch(NetworkNamespace):
    """A network namespace with a bridge, to which the hosts' links lead."""

    def __init__(self) -> None:
        super().__init__()
        self.ip("link add switch type bridge", "link set switch up")


class Link:
    """A host's interface ``eth0`` and the cable from it to the switch, whole at first.

    Faults add up: a link can be slow, lossy and down at the same time. All but :meth:`drop` act on both directions.

    Attributes:
        network: The host's network namespace.
    """

    def __init__(self, switch: Switch, name: str, address: str, run: Run) -> None:
        self.network = NetworkNamespace()
        self._switch = switch
        self._name = name  # of the cable's end in the switch
        self._run = run
        self._slow_link: subprocess.Popen[bytes] | None = None
        self._drops = False
        self._is_limited = False
        hardware_address = "02:00:" + ":".join(f"{int(number):02x}" for number in address.split("."))
        switch.ip(
            f"link add {name} mtu {MTU_BYTES} type veth peer name eth0 mtu {MTU_BYTES} netns {self.network.path}",
            f"link set {name} master switch up",
        )
        self.network.ip(
            f"link set eth0 address {hardware_address}",  # the same after a boot: its peers have it in their tables
            f"addr add {address}/{PREFIX_BITS} dev eth0",
            "link set eth0 up",
        )

    def down(self) -> None:
        """Pulls the cable out of the switch: packets vanish, and nobody is told."""
        self._switch.ip(f"link set {self._name} down")

    def up(self) -> None:
        """Puts the cable back."""
        self._switch.ip(f"link set {self._name} up")

    def drop(self, probability: float) -> None:
        """Loses each packet that arrives at the host with this probability; 0 ends it."""
        if self._drops:
            self._run(["iptables", "--flush", "INPUT"])
        self._drops = probability > 0
        if self._drops:
            lottery = ["--match", "statistic", "--mode", "random", "--probability", str(probability)]
            self._run(["iptables", "--append", "INPUT", "--in-interface", "eth0", *lottery, "--jump", "DROP"])

    def limit_rate(self, mbit_per_s: float | None) -> None:
        """Lets no more than this through in each direction; None ends it."""
        queue = ["noqueue"]
        if mbit_per_s is not None:
            # A bucket that the clock fills every 10 ms or oftener has to hold what passes in the meantime.
            bucket_bytes = max(16_000, int(mbit_per_s * 1e6 / 8 / 100))
            queue = ["tbf", "rate", f"{mbit_per_s}mbit", "burst", str(bucket_bytes), "latency", "200ms"]
        for network, interface in ((self.network, "eth0"), (self._switch, self._name)):
            network.run("tc", "qdisc", "replace", "dev", interface, "root", *queue)
        self._is_limited = mbit_per_s is not None

    def delay(self, seconds: float) -> None:
        """Lets every packet take so much longer in each direction; 0 ends it. What is under way is lost.

        The kernel's own delay (netem) is a module that many machines lack: a program takes the switch's place.
        """
        if self._slow_link is not None:
            _end(self._slow_link)  # its interface in the switch goes with it
            self._slow_link = None
        if not seconds:
            self._switch.ip(f"link set {self._name} master switch")
            return
        slow = f"{self._name}-slow"
        self._switch.ip(f"link set {self._name} nomaster")
        command = self._switch.enter(sys.executable, "-I", str(SLOW_LINK), self._name, slow, str(seconds))
        self._slow_link = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), start_new_session=True
        )
        assert self._slow_link.stdout is not None
        if self._slow_link.stdout.readline() != b"ready\n":
            self.delay(0.0)
            raise RuntimeError(f"{SLOW_LINK.name} failed: what it wrote on standard error says why")
        self._switch.ip(f"link set {slow} mtu {MTU_BYTES} master switch up")

    def reset_connections(self, peer: str) -> int:
        """Aborts every TCP connection of the host with address ``peer``, on both ends; new ones can be made.

        Returns:
            Number of connections.
        """
        return len(self._run(["ss", "--kill", "--no-header", "--tcp", "dst", peer]).splitlines())

    def heal(self) -> None:
        """Ends every fault."""
        self.up()
        self.drop(0.0)
        if self._is_limited:
            self.limit_rate(None)
        if self._slow_link is not None:
            self.delay(0.0)

    def close(self) -> None:
        """Removes the link and lets go of the host's network."""
        if self._slow_link is not None:
            _end(self._slow_link)
            self._slow_link = None
        if self.network.is_open:
            self._switch.ip(f"link del {self._name}")
            self.network.close()


def why_no_delay() -> str | None:
    """The reason why a link cannot be slow here, or None if it can."""
    return None if os.path.exists("/dev/net/tun") else "a delay needs /dev/net/tun"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and closes its pipes."""
    process.kill()
    with process:
        pass
