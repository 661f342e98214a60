"""A Slurm cluster on imitated hosts: slurmctld on the first, slurmd on each, and munge, by which they know each other.

Its settings are seen inside the hosts only, where ``sbatch``, ``srun`` and the like work as on any cluster; so are its
sockets and spool folders, which are in the hosts' own ``/run``. Times are short: a job that was requeued runs again
after 6 s, a dead node is noticed after 10 to 20 s.
"""

import re
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.launch import hosts as imitated
from tests.launch.hosts import Host, Hosts
from tests.launch.processes import Process

SETTINGS = """ClusterName=imitated
SlurmctldHost={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job may start when its credential has expired: after 5 s at the least, 120 s by default.
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
SlurmdTimeout=10
MessageTimeout=5
KillWait=5
# As many CPUs as said here, whatever the machine has.
SlurmdParameters=config_overrides
NodeName=host[1-{num_hosts}] CPUs={cpus_per_host} RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
END_STATES = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
POLL_S = 0.1


def why_not() -> str | None:
    """The reason why a Slurm cluster cannot be imitated here, or None if it can."""
    return imitated.why_not("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "sinfo", "srun")


class Slurm:
    """A running cluster; its daemons end with their hosts, and start again when these boot.

    Jobs are given by their ids. Commands run on the first host.

    Attributes:
        hosts: Its nodes.
        folder: Settings, state and logs.
    """

    def __init__(self, hosts: Hosts, cpus_per_host: int = 2) -> None:
        """Starts the daemons and waits until all nodes are idle."""
        self.hosts = hosts
        self.folder = hosts.folder / "slurm"
        (self.folder / "etc").mkdir(parents=True)
        (self.folder / "state").mkdir()
        settings = SETTINGS.format(
            controller=hosts[0].name, folder=self.folder, num_hosts=len(hosts), cpus_per_host=cpus_per_host
        )
        (self.folder / "etc" / "slurm.conf").write_text(settings)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        self._slurmds: dict[str, Process] = {}
        hosts.at_boot(self._start)
        self.wait_for_nodes("idle", [host.name for host in hosts])

    def _start(self, host: Host) -> None:
        host.run(["mount", "--bind", self.folder / "etc", "/etc/slurm"])
        host.run(["mkdir", "/run/munge"])
        files = (f"--key-file={self.folder / 'munge.key'}", "--seed-file=/run/munge/munge.seed")
        # It wants no folder above these to be writable by others: --force makes that a warning.
        self._daemon(host, "munged", "--foreground", "--force", *files)
        munge = ["munge", "--no-input"]
        wait_until(lambda: not host.run(munge, check=False).returncode, 10, lambda: host.run(munge, check=False).stderr)
        if host.name == self.hosts[0].name:
            self._daemon(host, "slurmctld", "-D")
        self._slurmds[host.name] = self._daemon(host, "slurmd", "-D")

    def _daemon(self, host: Host, *command: str) -> Process:
        return host.popen(command, log=self.folder / f"{command[0]}.{host.name}.log")

    def run(self, command: Sequence[str | Path], **options: Any) -> str:
        """Runs a command on the first host, with options of :meth:`Host.run`, and returns its output."""
        return self.hosts[0].run(command, **options).stdout

    def nodes(self) -> dict[str, str]:
        """State of every node, such as ``idle``, ``alloc`` or ``down``; ``*`` after it: it does not answer."""
        lines = self.run(["sinfo", "--noheader", "--Node", "--format", "%N %t"]).splitlines()
        return dict(line.split() for line in lines)

    def wait_for_nodes(self, state: str, names: Collection[str], timeout: float = 30.0) -> None:
        """Waits until all nodes of these names are in a state; a state without ``*`` is also waited for with it."""

        def reached() -> bool:
            nodes = self.nodes()
            return all(nodes.get(name, "").rstrip("*") == state for name in names)

        wait_until(reached, timeout, lambda: f"nodes are {self.nodes()}, not {state}")

    def submit(
        self,
        script: Path,
        *options: str,
        arguments: Sequence[str] = (),
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> int:
        """Queues a batch script and returns the job's id.

        Args:
            script: Its ``#SBATCH`` lines count.
            options: Of ``sbatch``; they outdo the script's.
            arguments: Of the script.
            cwd: The job's working directory; None: this process's.
            env: Added to the job's environment, which is this process's.
        """
        command = ["sbatch", "--parsable", *options, str(script), *arguments]
        return int(self.run(command, cwd=cwd, env=env))

    def show(self, job: int) -> dict[str, str]:
        """All that ``scontrol show job`` says about a job: ``JobState``, ``Restarts``, ``ExitCode``, ..."""
        shown = self.run(["scontrol", "--oneliner", "show", "job", str(job)])
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def state(self, job: int) -> str:
        """``PENDING``, ``RUNNING``, ``COMPLETING``, or how it ended, such as ``COMPLETED`` or ``FAILED``."""
        return self.show(job)["JobState"]

    def wait(self, job: int, states: Collection[str] = END_STATES, timeout: float = 60.0) -> str:
        """Waits until a job is in one of these states and returns it.

        Raises:
            AssertionError: It was not in ``timeout`` seconds; the message shows the job.
        """
        state = ""

        def reached() -> bool:
            nonlocal state
            state = self.state(job)
            return state in states

        wait_until(reached, timeout, lambda: f"not {' or '.join(sorted(states))}: {self.show(job)}")
        return state

    def cancel(self, job: int) -> None:
        """Ends a job: SIGTERM, and SIGKILL after 5 seconds (``KillWait``)."""
        self.run(["scancel", str(job)])

    def signal(self, job: int, name: str, *, batch: bool = False) -> None:
        """Sends a signal, such as ``USR1``, to a job's steps, or to its batch script alone."""
        self.run(["scancel", f"--signal={name}", *(["--batch"] if batch else []), str(job)])

    def requeue(self, job: int) -> None:
        """Ends a job as :meth:`cancel` does, and puts it into the queue again."""
        self.run(["scontrol", "requeue", str(job)])

    def kill_slurmd(self, host: Host) -> None:
        """Kills a host's slurmd; the tasks that it started go on."""
        self._slurmds[host.name].kill()
        self._slurmds[host.name].wait()

    def restart_slurmd(self, host: Host) -> None:
        """Kills a host's slurmd, if it runs, and starts it anew."""
        self.kill_slurmd(host)
        self._slurmds[host.name] = self._daemon(host, "slurmd", "-D")


def wait_until(reached: Callable[[], bool], timeout: float, complaint: Callable[[], str]) -> None:
    """Waits until ``reached()``, and raises AssertionError with the complaint when that takes ``timeout`` seconds."""
    give_up = time.monotonic() + timeout
    while not reached():
        if time.monotonic() > give_up:
            raise AssertionError(f"{complaint()} after {timeout} s")
        time.sleep(POLL_S)
