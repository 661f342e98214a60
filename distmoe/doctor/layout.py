"""Who is where in a run, and why it cannot run so, if it cannot."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from distmoe.config import RunConfig
from distmoe.contracts import UserError
from distmoe.doctor.findings import Finding, ok, refused, table
from distmoe.parallel.engines import choose_engine
from distmoe.parallel.mesh import Mesh
from distmoe.parallel.runtime import available_cpus, check_layout, check_precision, choose_device
from distmoe.parallel.world import World

Result = TypeVar("Result")


def engine_of(config: RunConfig, world: World) -> str | None:
    """The engine that the run will choose; None where its layout is refused."""
    try:
        return choose_engine(config, check_layout(config, world))
    except UserError:
        return None


def examine_layout(
    config: RunConfig, world: World, device: torch.device, hosts: Sequence[str], imagined: bool
) -> tuple[list[Finding], list[str]]:
    """What a run would be refused for; and the map: rank, host, device, copy and experts.

    Args:
        config: The run.
        world: Its processes.
        device: Of the kind that its ranks use.
        hosts: Name of the host of each rank.
        imagined: Whether its processes are not there.
    """
    findings: list[Finding] = []
    _note(findings, "run", config.check_trainable)
    if not imagined:
        _note(findings, "devices", lambda: choose_device(world))
    mesh = _note(findings, "layout", lambda: check_layout(config, world))
    _note(findings, "precision", lambda: check_precision(config, device))
    if mesh is None:
        return findings, []
    engine = _note(findings, "engine", lambda: choose_engine(config, mesh))
    if not findings:
        findings.append(ok("layout", "fits the processes and the experts"))
    return findings, ["", *_summary(config, world, mesh, engine), "", *_map(config, world, mesh, device.type, hosts)]


def _note(findings: list[Finding], subject: str, check: Callable[[], Result]) -> Result | None:
    """What a check gives; what it refuses becomes a finding."""
    try:
        return check()
    except UserError as error:
        findings.append(refused(subject, error))
        return None


def _summary(config: RunConfig, world: World, mesh: Mesh, engine: str | None) -> list[str]:
    auto = " (auto)" if config.parallel.expert_parallel_size == "auto" else ""
    chosen = " (auto)" if config.parallel.backend == "auto" else ""
    threads = config.train.num_threads or max(available_cpus() // world.ranks_per_host, 1)
    rows = [
        ("processes", f"{world.size}, {world.ranks_per_host} on a host"),
        ("engine", f"{engine or 'none'}{chosen}, ZeRO {config.parallel.zero_stage}"),
        ("expert-parallel size", f"{mesh.expert_parallel_size}{auto}; copies of each expert: {mesh.num_replicas}"),
        ("threads of a process", str(threads)),
    ]
    return table(rows)


def _map(config: RunConfig, world: World, mesh: Mesh, device: str, hosts: Sequence[str]) -> list[str]:
    num_experts = config.moe.num_experts if config.moe is not None else 0
    rows: list[Sequence[str]] = [("rank", "host", "device", "copy", "experts")]
    for rank in range(world.size):
        place = mesh.at(rank)
        experts = place.local_experts(num_experts) if num_experts else range(0)
        where = f"cuda:{rank % world.ranks_per_host}" if device == "cuda" else "cpu"
        rows.append((str(rank), hosts[rank], where, str(place.replica), _named(experts)))
    return table(rows)


def _named(experts: range) -> str:
    if not experts:
        return "none"
    return str(experts.start) if len(experts) == 1 else f"{experts.start}-{experts.stop - 1}"
