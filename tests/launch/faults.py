"""What can go wrong with a training, one kind after the other: how it is done to it, and what it may lose by it.

A kind is a generator: what it does before its first ``yield`` is the fault itself; at each ``yield`` the training goes
on for a moment, and when the generator is at its end, everything that was taken away is back.
"""

import logging
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from tests.launch.hosts import Host
from tests.launch.supervised import SupervisedRun

logger = logging.getLogger(__name__)

MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")
NO_SPACE = "No space left on device"


@dataclass(frozen=True)
class Fault:
    """One that was drawn.

    Attributes:
        kind: One of :data:`KINDS`.
        step: It comes when this step is done, or a later one where the training has not got over the fault before.
        delay_ms: So much later.
        while_saving: Then as soon as a checkpoint is being written.
        rank: Whom it hits.
        host: Where, counted from 0.
        lasts_s: How long something is away that comes back.
        place: In a checkpoint: what is damaged there; from 0 to below 1.
    """

    kind: str
    step: int
    delay_ms: int
    while_saving: bool
    rank: int
    host: int
    lasts_s: float
    place: float


@dataclass
class Damage:
    """A checkpoint that was damaged.

    Attributes:
        step: Whose.
        file: Which of its files.
    """

    step: int
    file: str


Strike = Callable[[SupervisedRun, Fault, list[Damage]], Iterator[None]]


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        strike: Does it; what it damages on disk it adds to its last argument.
        loses: What of the training: ``nothing``: no step; ``checkpoint``: the steps since the newest checkpoint;
            ``damaged``: that checkpoint as well. ``unnoticed``: it does not even stop.
        lasts_s: From and to how long something is away.
        several_hosts: Whether it takes two.
    """

    strike: Strike
    loses: Literal["nothing", "checkpoint", "damaged", "unnoticed"] = "checkpoint"
    lasts_s: tuple[float, float] = (0.0, 0.0)
    several_hosts: bool = False


def send(run: SupervisedRun, ranks: list[int], number: int) -> None:
    """Sends a signal to ranks; those that end by it are victims."""
    run.harmed_after = run.starts
    processes = run.ranks()
    for rank in ranks:
        if number == signal.SIGKILL:
            run.victims.add(processes[rank].pid)
        processes[rank].send_signal(number)


def pause(seconds: float) -> Iterator[None]:
    """Lets time pass."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield


def kill_rank(run: SupervisedRun, fault: Fault, damage: list[Damage]) -> Iterator[None]:
    send(run, [fault.rank], signal.SIGKILL)
    yield


def kill_all_ranks(run: SupervisedRun, fault: Fault, damage: list[Damage]) -> Iterator[None]:
    send(run, list(range(run.num_ranks)), signal.SIGKILL)
    yield


def stop_rank(run: SupervisedRun, fault: Fault, damage: list[Damage]) -> Iterator[None]:
    send(run, [fault.rank], signal.SIGSTOP)
    yield


def stop_rank_for_a_while(run: SupervisedRun, fault: Fault, damage: list[Damage]) -> Iterator[None]:
    """It goes on before the others notice, or when they have given it up already."""
    process = run.ranks()[fault.rank]
    send(run, [fault.rank], signal.SIGSTOP)
    yield from pause(fault.lasts_s)
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGCONT)


def kill_one_and_stop_others(run: SupervisedRun, fault: Fault, damage: list[Damage]) -> Iterator[None]:
    send(run, [rank for rank in range(run.num_ranks) if rank != fault.rank], signal.SIGSTOP)
    send(run, [fault.rank], signal.SIGKILL)
    yield


def kill_while_starting(run: SupervisedRun, fault: Fault, damage: list[Damage]) -> Iterator[None]:
    before = run.ranks()[fault.rank]
    send(run, [fault.rank], signal.SIGKILL)
    while run.ranks().get(fault.rank, before) == before:
        yield
    yield from pause(fault.lasts_s)
    if fault.rank in run.ranks():  # it may have left for another reason
        send(run, [fault.rank], signal.SIGKILL)


def terminate_rank(run: SupervisedRun, fault: Fault, damage: list[Damage]) -> Iterator[None]:
    send(run, [fault.rank], signal.SIGTERM)
    yield


def exhaust_memory(run: SupervisedRun, fault: Fault, damage: list[Damage]) -> Iterator[None]:
    """The kernel kills the rank; where groups of processes cannot be given a limit, a signal stands for the kernel."""
    process = run.ranks()[fault.rank]
    group = MEMORY_GROUPS / f"distmoe-{process.pid}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text("4096")  # a page, after what it has already
        run.harmed_after = run.starts
        run.victims.add(process.pid)
        (group / "cgroup.procs").write_text(str(process.pid))
    except OSError as error:
        logger.info("no limit of memory here (%s): SIGKILL in its place", error)
        send(run, [fault.rank], signal.SIGKILL)
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        yield
    with suppress(OSError):
        group.rmdir()


def terminate_launcher(run: SupervisedRun, fault: Fault, damage: list[Damage]) -> Iterator[None]:
    yield from _signal_launcher(run, fault, signal.SIGTERM)


def kill_launcher(run: SupervisedRun, fault: Fault, damage: list[Damage]) -> Iterator[None]:
    yield from _signal_launcher(run, fault, signal.SIGKILL)


def _signal_launcher(run: SupervisedRun, fault: Fault, number: int) -> Iterator[None]:
    launcher = run.launchers[fault.host]
    run.harmed_after = run.starts
    pid = launcher.pid()
    assert pid is not None, "a launcher ends only by a fault"
    run.victims.add(pid)
    launcher.signal(number)
    yield


def fill_disk(run: SupervisedRun, fault: Fault, damage: list[Damage]) -> Iterator[None]:
    assert run.disk is not None, "not a run whose disk may be filled"
    filler = run.disk / "filler"
    run.harmed_after = run.starts
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    while not any(NO_SPACE in line for line in run.lines):
        yield
    yield from pause(fault.lasts_s)
    filler.unlink()


def truncate_file(run: SupervisedRun, fault: Fault, damage: list[Damage]) -> Iterator[None]:
    def truncate(path: Path, place: float) -> None:
        os.truncate(path, int(path.stat().st_size * place))

    yield from _damage_and_kill(run, fault, damage, truncate)


def flip_bit(run: SupervisedRun, fault: Fault, damage: list[Damage]) -> Iterator[None]:
    def flip(path: Path, place: float) -> None:
        byte, bit = divmod(int(path.stat().st_size * 8 * place), 8)
        content = bytearray(path.read_bytes())
        content[byte] ^= 1 << bit
        with path.open("r+b") as file:  # not as long as no file: there is no moment at which it is empty
            file.write(content)

    yield from _damage_and_kill(run, fault, damage, flip)


def remove_file(run: SupervisedRun, fault: Fault, damage: list[Damage]) -> Iterator[None]:
    yield from _damage_and_kill(run, fault, damage, lambda path, place: path.unlink())


def _damage_and_kill(
    run: SupervisedRun, fault: Fault, damage: list[Damage], spoil: Callable[[Path, float], None]
) -> Iterator[None]:
    """Damages the newest checkpoint, if there is one, and kills rank 0, which alone completes others: it is met."""
    folder = run.folder.checkpoints()
    _freeze(run)
    while any(folder.root.glob(".replaced-*")):  # the newest is about to come back under its name
        send(run, [0], signal.SIGCONT)
        yield
        _freeze(run)
    if steps := folder.steps():
        choose = random.Random(fault.place)
        path = choose.choice(sorted(folder.path(steps[-1]).iterdir()))
        spoil(path, choose.random())
        damage.append(Damage(steps[-1], path.name))
        logger.info("damaged %s", path)
    send(run, [0], signal.SIGKILL)


def _freeze(run: SupervisedRun) -> None:
    """Stops rank 0, and returns when it has stopped."""
    send(run, [0], signal.SIGSTOP)
    rank = run.ranks()[0]
    while rank.status() != psutil.STATUS_STOPPED:
        time.sleep(0.001)


def cut_link(run: SupervisedRun, fault: Fault, damage: list[Damage]) -> Iterator[None]:
    run.harmed_after = run.starts
    run.hosts[fault.host].link.down()
    yield from pause(fault.lasts_s)
    run.hosts[fault.host].link.up()


def kill_host(run: SupervisedRun, fault: Fault, damage: list[Damage]) -> Iterator[None]:
    yield from _turn_off(run, fault, silently=False)


def kill_host_silently(run: SupervisedRun, fault: Fault, damage: list[Damage]) -> Iterator[None]:
    yield from _turn_off(run, fault, silently=True)


def _turn_off(run: SupervisedRun, fault: Fault, silently: bool) -> Iterator[None]:
    host: Host = run.hosts[fault.host]
    run.harmed_after = run.starts
    run.victims.update(host.pids())
    host.kill(silently=silently)
    yield from pause(fault.lasts_s)
    host.boot()


# TCP repeats a lost packet after 0.2, 0.6, 1.4, 3 s: what heals within 1.2 s is made up for within 3 s, before the 5 s
# after which an exchange gives up (half of a time limit of 10 s).
KINDS: dict[str, Kind] = {
    "rank killed": Kind(kill_rank),
    "all ranks killed": Kind(kill_all_ranks),
    "rank stopped": Kind(stop_rank),  # until torchrun, which first waits for 30 s, kills it
    "rank stopped briefly": Kind(stop_rank_for_a_while, loses="unnoticed", lasts_s=(0.5, 3.0)),
    "rank stopped for a while": Kind(stop_rank_for_a_while, lasts_s=(8.0, 12.0)),
    "one killed, others stopped": Kind(kill_one_and_stop_others),
    "killed, and again while starting": Kind(kill_while_starting, lasts_s=(0.0, 8.0)),
    "rank out of memory": Kind(exhaust_memory),
    "rank terminated": Kind(terminate_rank, loses="nothing"),
    "launcher terminated": Kind(terminate_launcher, loses="nothing"),
    "launcher killed": Kind(kill_launcher),
    "disk full": Kind(fill_disk, lasts_s=(0.0, 2.0)),
    "checkpoint truncated": Kind(truncate_file, loses="damaged"),
    "checkpoint with a flipped bit": Kind(flip_bit, loses="damaged"),
    "checkpoint without a file": Kind(remove_file, loses="damaged"),
    "link down": Kind(cut_link, lasts_s=(13.0, 18.0), several_hosts=True),
    "link down briefly": Kind(cut_link, loses="unnoticed", lasts_s=(0.3, 1.2), several_hosts=True),
    "host off": Kind(kill_host, lasts_s=(0.5, 6.0), several_hosts=True),
    "host off, silently": Kind(kill_host_silently, lasts_s=(13.0, 18.0), several_hosts=True),
}
