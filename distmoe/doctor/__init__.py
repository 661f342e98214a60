"""``distmoe doctor``: looks at a machine, at the hosts of a run and at its layout, without running it.

Every module looks at one thing and gives findings (:mod:`distmoe.doctor.findings`); here they are put in order. After a
launcher's name all ranks meet, one on each host looks at it, and rank 0 prints.
"""

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from distmoe.config import RunConfig
from distmoe.contracts import UserError
from distmoe.doctor.clocks import judge_hosts, measure_ranks
from distmoe.doctor.dataset import examine_dataset
from distmoe.doctor.findings import Finding, Section, ok, plural, summary
from distmoe.doctor.gpus import can_use_gpus, examine_gpus
from distmoe.doctor.hostfile import Hostfile, read_hostfile
from distmoe.doctor.hosts import examine_hosts
from distmoe.doctor.layout import engine_of, examine_layout
from distmoe.doctor.machine import examine_machine
from distmoe.doctor.network import examine_network
from distmoe.doctor.packages import examine_packages
from distmoe.doctor.storage import examine_storage
from distmoe.parallel.runtime import open_runtime
from distmoe.parallel.world import World
from distmoe.training.forecast import check_world
from distmoe.training.run_folder import RunFolder

USUAL_PORT = 29500
"""Of the store, where nothing else is said: torchrun's, deepspeed's and accelerate's."""


@dataclass(frozen=True)
class Question:
    """What to look at.

    Attributes:
        config: The run; None: the machine alone.
        prepare: The command that prepares its data.
        num_ranks: Processes to imagine, in place of those that are there; None: none are imagined.
        ranks_per_host: Of them on each host; None: all.
        hostfile: File of the run's hosts, which are asked; None: there are no others, or a launcher's processes.
        port: Of the store; None: that of ``MASTER_PORT``, or the usual one.
        ssh_port: Of ssh on all hosts; None: the one of ssh's own configuration.
    """

    config: RunConfig | None = None
    prepare: str = ""
    num_ranks: int | None = None
    ranks_per_host: int | None = None
    hostfile: Path | None = None
    port: int | None = None
    ssh_port: int | None = None


def examine(question: Question, show: Callable[[str], None]) -> bool:
    """Looks, and shows what is found, a section at a time. With a run and after a launcher's name: collective.

    Args:
        question: What at.
        show: Prints a text; on rank 0.

    Returns:
        Whether nothing failed.

    Raises:
        UserError: What is asked for does not fit together; or a launcher's processes cannot be a run.
    """
    launched = World.of_environment()
    if question.hostfile is not None:
        if launched.size > 1:
            raise UserError(
                f"--hostfile {question.hostfile} has one process ask the hosts, but a launcher has started "
                f"{launched.size}: leave one of the two away"
            )
        sections = _asking_hosts(question, read_hostfile(question.hostfile))
    elif question.num_ranks is not None:
        sections = _imagining(question, question.num_ranks)
    elif launched.size > 1:
        if question.port is not None:
            raise UserError(f"--port ({question.port}): a launcher has chosen the port already; leave --port away")
        sections = _after_a_launcher(question, launched)
    else:
        sections = _alone(question, launched)
    findings: list[Finding] = []
    for section in sections:
        show(section.text)
        findings += section.findings
    show(summary(findings))
    return all(finding.level != "fail" for finding in findings)


def _alone(question: Question, world: World) -> Iterator[Section]:
    yield from _own_host(question, world)
    if question.config is not None:
        yield _layout(question.config, world, [platform.node()] * world.size)


def _imagining(question: Question, num_ranks: int) -> Iterator[Section]:
    per_host = min(question.ranks_per_host or num_ranks, num_ranks)
    check_world(num_ranks, per_host)
    world = World(size=num_ranks, ranks_per_host=per_host)
    yield from _own_host(question, world, here=False)
    if question.config is not None:
        hosts = [f"host {rank // per_host}" for rank in range(num_ranks)]
        yield _layout(question.config, world, hosts, imagined=True)


def _asking_hosts(question: Question, hostfile: Hostfile) -> Iterator[Section]:
    world = World(size=hostfile.world_size, ranks_per_host=hostfile.slots)
    config = question.config
    # What other hosts find of names and ports counts, and is asked below: here they are those of one host.
    yield from _own_host(question, world, asked=True)
    run_dir = None if config is None else Path(config.run.dir)
    found = examine_hosts(hostfile, _port(question), question.ssh_port, run_dir)
    slots = f"{plural(hostfile.slots, 'slot')} each"
    yield Section(f"hosts of {question.hostfile}: {plural(len(hostfile.names), 'host')}, {slots}", found)
    if config is not None:
        hosts = [name for name in hostfile.names for _ in range(hostfile.slots)]
        yield _layout(config, world, hosts, imagined=True)


def _after_a_launcher(question: Question, world: World) -> Iterator[Section]:
    """The same findings on all ranks; the host of rank 0 whole, of the others what is not as it should be."""
    config = question.config
    looks = world.local_rank == 0
    own = list(_own_host(question, world)) if looks else []
    if config is None:  # nothing says how long to wait for others: every rank speaks for itself
        yield from own
        return
    if world.rank == 0:  # printed before the meeting, in which the run may be refused
        yield from own
    with open_runtime(config, world) as runtime:
        hosts = runtime.control.gather(platform.node())
        findings = runtime.control.gather([finding for section in own for finding in section.findings])
        skews = runtime.control.gather(measure_ranks(runtime.control))[0]
    if world.rank != 0:
        yield Section(f"machine {hosts[0]}", findings[0])
    for rank in range(world.ranks_per_host, world.size, world.ranks_per_host):
        faults = [finding for finding in findings[rank] if finding.level != "ok"]
        yield Section(f"machine {hosts[rank]}", faults or [ok("all", f"{len(findings[rank])} lines, as above")])
    if world.several_hosts:
        yield Section("clocks", judge_hosts(hosts, skews, world.ranks_per_host))
    yield _layout(config, world, hosts)


def _own_host(question: Question, world: World, here: bool = True, asked: bool = False) -> Iterator[Section]:
    """This host, and what it holds of a run.

    Args:
        question: What is asked.
        world: Processes of the run.
        here: Whether the run is to be on this host.
        asked: Whether hosts are asked for their names and ports themselves.
    """
    config, with_gpus = question.config, can_use_gpus()
    launched = here and not asked and world.size > 1
    ranks_here = world.ranks_per_host if launched else 1
    yield Section(f"machine {platform.node()}", [*examine_machine(world.size, ranks_here, with_gpus), *examine_gpus()])
    engine = None if config is None else engine_of(config, world)
    needs_ffcv = None if config is None else config.data.loader == "ffcv"
    yield Section("packages", examine_packages(needs_ffcv, None if engine is None else engine == "deepspeed"))
    port = None if launched or asked else _port(question)
    yield Section("network", examine_network(world.several_hosts and not asked, port))
    if config is not None:
        dataset = examine_dataset(config.data, question.prepare, here, several_ranks=world.size > 1)
        yield Section(f"run {RunFolder.of(config).path}", [*dataset.findings, *examine_storage(config, dataset, here)])


def _port(question: Question) -> int:
    said = os.environ.get("MASTER_PORT", "")
    return question.port or (int(said) if said.isdecimal() and 0 < int(said) < 2**16 else USUAL_PORT)


def _layout(config: RunConfig, world: World, hosts: list[str], imagined: bool = False) -> Section:
    device = torch.device("cuda" if can_use_gpus() else "cpu", 0)
    return Section("layout", *examine_layout(config, world, device, hosts, imagined))
