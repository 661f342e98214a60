"""Looking at the machine and at the layout of a run, without running it: what is there, who is where, what is wrong."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from distmoe.config import RunConfig
from distmoe.contracts import UserError
from distmoe.parallel.engines import choose_engine
from distmoe.parallel.mesh import Mesh
from distmoe.parallel.runtime import available_cpus, check_layout, check_precision, choose_device, open_runtime
from distmoe.parallel.world import World
from distmoe.training.versions import package_versions

Result = TypeVar("Result")


@dataclass
class Findings:
    """What there is to say.

    Attributes:
        lines: In order.
        problems: Why a run is not possible so, each with its remedy.
    """

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """For printing."""
        return "\n".join([*self.lines, *(f"problem: {problem}" for problem in self.problems)])


def look_at_machine() -> Findings:
    """Versions and devices of this host."""
    rows = [("python", platform.python_version())]
    rows += [(package, version or "not installed") for package, version in package_versions().items()]
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    rows += [
        ("host", platform.node()),
        ("CPUs", f"{available_cpus()} for this process"),
        ("GPUs", ", ".join(gpus) or "none"),
    ]
    return Findings(_table(rows))


def look_at_layout(config: RunConfig, world: World, imagined: bool = False) -> Findings:
    """Who is where in a run, and why it cannot run so, if it cannot. Collective, unless ``imagined``.

    Args:
        config: The run.
        world: Its processes.
        imagined: Whether they are not there: they are then said to be on hosts 0, 1, ...
    """
    findings = look_at_machine()
    problems = findings.problems
    _note(problems, config.check_trainable)
    hosts: Sequence[str] = [f"host {rank // world.ranks_per_host}" for rank in range(world.size)]
    if imagined or world.size == 1:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu", 0)
        if not imagined:
            hosts = [platform.node()]
            _note(problems, lambda: choose_device(world))
        mesh = _note(problems, lambda: check_layout(config, world))
        _note(problems, lambda: check_precision(config, device))
    else:
        with open_runtime(config, world) as runtime:
            device, mesh = runtime.device, runtime.mesh
            hosts = runtime.control.gather(platform.node())
    if mesh is not None:
        engine = _note(problems, lambda: choose_engine(config, mesh))
        _check_packages(config, engine, problems)
        findings.lines += ["", *_layout(config, world, mesh, engine, device.type, hosts)]
    return findings


def _note(problems: list[str], check: Callable[[], Result]) -> Result | None:
    """What a check gives; what it refuses becomes a problem."""
    try:
        return check()
    except UserError as error:
        problems.append(str(error))
        return None


def _layout(
    config: RunConfig, world: World, mesh: Mesh, engine: str | None, device: str, hosts: Sequence[str]
) -> list[str]:
    num_experts = config.moe.num_experts if config.moe is not None else 0
    auto = " (auto)" if config.parallel.expert_parallel_size == "auto" else ""
    chosen = " (auto)" if config.parallel.backend == "auto" else ""
    threads = config.train.num_threads or max(available_cpus() // world.ranks_per_host, 1)
    rows = [
        ("processes", f"{world.size}, {world.ranks_per_host} on a host"),
        ("engine", f"{engine or 'none'}{chosen}, ZeRO {config.parallel.zero_stage}"),
        ("expert-parallel size", f"{mesh.expert_parallel_size}{auto}; copies of each expert: {mesh.num_replicas}"),
        ("threads of a process", str(threads)),
    ]
    ranks: list[Sequence[str]] = [("rank", "host", "device", "copy", "experts")]
    for rank in range(world.size):
        place = mesh.at(rank)
        experts = place.local_experts(num_experts) if num_experts else range(0)
        ranks.append(
            (
                str(rank),
                hosts[rank],
                f"cuda:{rank % world.ranks_per_host}" if device == "cuda" else "cpu",
                str(place.replica),
                f"{experts.start}-{experts.stop - 1}"
                if len(experts) > 1
                else str(experts.start)
                if experts
                else "none",
            )
        )
    return [*_table(rows), "", *_table(ranks)]


def _check_packages(config: RunConfig, engine: str | None, problems: list[str]) -> None:
    installed = package_versions()
    if config.data.loader == "ffcv" and installed["ffcv"] is None:
        problems.append(
            "data.loader is ffcv, which is not installed: run `bash launch/setup.sh`, or set data.loader=resident"
        )
    if engine == "deepspeed" and installed["deepspeed"] is None:
        problems.append(
            "the engine is deepspeed, which is not installed: run pip install 'distmoe[deepspeed]', or set "
            "parallel.expert_parallel_size=1 and parallel.zero_stage=0"
        )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
