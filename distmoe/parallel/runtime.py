"""The process a run lives in, and its place among others: device, threads, determinism, logging, signals, groups."""

import logging
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist

from distmoe.config import RunConfig, config_to_yaml
from distmoe.contracts import UserError
from distmoe.parallel.collectives import Observe, unobserved
from distmoe.parallel.control import Control
from distmoe.parallel.endings import deaf_to_sigterm
from distmoe.parallel.handshake import compare_builds, publish_build
from distmoe.parallel.heartbeat import Heartbeat
from distmoe.parallel.joining import join_run
from distmoe.parallel.mesh import Mesh, choose_mesh
from distmoe.parallel.network import chosen_interface
from distmoe.parallel.stop_signals import Interrupted, StopSignals, stop_with_launcher
from distmoe.parallel.world import World

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_EARLY_LIMIT_S = 15.0


@dataclass
class Runtime:
    """What a run knows about its process.

    Attributes:
        device: Where the model lives.
        mesh: The place of this rank among all.
        control: What ranks agree on; over CPU memory whatever the device.
        num_threads: CPU threads of torch.
        restarts: How often a launcher has restarted this run.
        launches: The launchers' processes of all hosts, and their job, see :class:`distmoe.parallel.launchers.Place`.
        limit_s: Seconds after which an exchange gives up.
        stop: Signals that ask this rank to save and stop.
    """

    device: torch.device
    mesh: Mesh = field(default_factory=Mesh)
    control: Control = field(default_factory=Control)
    num_threads: int = 1
    restarts: int = 0
    launches: tuple[str, ...] = ()
    limit_s: float = 300.0
    stop: StopSignals = field(default_factory=StopSignals)
    heartbeat: Heartbeat | None = None

    @property
    def rank(self) -> int:
        """Position among all processes, from 0."""
        return self.mesh.rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.mesh.world_size

    @property
    def expert_parallel_size(self) -> int:
        """Processes that share one copy of the experts."""
        return self.mesh.expert_parallel_size

    @property
    def observe(self) -> Observe:
        """For the engine: the exchange that goes on is part of this rank's signs of life."""
        return unobserved if self.heartbeat is None else self.heartbeat.during

    def at(self, place: str) -> None:
        """Notes where this rank is (``step 12, forward``), for messages of this one or of others."""
        if self.heartbeat is not None:
            self.heartbeat.at(place)

    def wait_for_all(self, what: str) -> None:
        """Waits without a time limit, with lines of progress, for ranks that work alone for long. Collective.

        Data is prepared or an extension compiled on some host: no exchange could wait for that. A rank that gives no
        sign of life any more is not waited for.

        Args:
            what: What they have done then: ``opening the data``.
        """
        if self.heartbeat is not None:
            self.heartbeat.wait_for_all(logger.info if self.control.is_main else logger.debug, what)

    def limit_exchanges(self) -> None:
        """Gives all groups of processes this run's time limit: those that libraries have made wait half an hour."""
        if self.world_size > 1:
            for group in list(dist.distributed_c10d._world.pg_map):
                dist.set_timeout(timedelta(seconds=self.limit_s), group)

    def synchronize(self) -> None:
        """Waits until the device has done what it was given; a CPU always has."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def open_runtime(config: RunConfig, world: World | None = None) -> Iterator[Runtime]:
    """Joins the other processes, sets threads and determinism, catches signals; puts everything back on the way out.

    Where there are several processes, an error that leaves this context on one of them ends all, see
    :mod:`distmoe.parallel.heartbeat`. Collective.

    Args:
        config: The run; the same on all ranks.
        world: The processes; None: those of the launcher's environment variables.

    Raises:
        UserError: The configuration does not fit this machine or this number of processes, or some have not come.
        PeerFailureError: Another rank has failed, and prints why.
        LostRanksError: Other ranks are gone or do not answer.
    """
    world = world if world is not None else World.of_environment()
    limit_s = exchange_limit_s(config.parallel.timeout_s)
    if world.launch is not None:  # before any waiting: who is left behind there would join the next run
        stop_with_launcher()
    with ExitStack() as stack:
        heartbeat = None
        if world.size > 1:
            heartbeat = stack.enter_context(_joined(world, config.parallel.timeout_s, limit_s))
            master = world.master[0] if world.master is not None else "localhost"
            stack.enter_context(chosen_interface(master, world.several_hosts and world.master is not None))
        device = choose_device(world)
        mesh = check_layout(config, world)
        check_precision(config, device)
        control = Control()
        if heartbeat is not None:
            control = stack.enter_context(_groups(config, world, heartbeat, device, limit_s))
        runtime = Runtime(
            device=device,
            mesh=mesh,
            control=control,
            num_threads=config.train.num_threads or max(available_cpus() // world.ranks_per_host, 1),
            restarts=int(control.largest([world.restarts])[0]),  # a launcher's process on each host counts its own
            launches=tuple(sorted({one for both in control.gather((world.launch, world.job)) for one in both if one})),
            limit_s=limit_s,
            heartbeat=heartbeat,
        )
        stack.enter_context(_settings(runtime))
        stack.enter_context(runtime.stop.caught())
        yield runtime


def told_once(function: Callable[[], Result]) -> Result:
    """What ``function`` gives, before this rank has joined the others.

    Raises:
        UserError: It raised one; of an error that all ranks have, one of them raises it.
        PeerFailureError: The others.
    """
    try:
        return function()
    except UserError as error:
        world = World.of_environment()
        if world.size == 1:
            raise
        try:
            heartbeat = join_run(world, _EARLY_LIMIT_S, _EARLY_LIMIT_S)
        except UserError:  # nobody else is there
            raise error from None
        with deaf_to_sigterm():
            told = heartbeat.settle(error)
        heartbeat.stop()
        raise told from None


def is_connected() -> bool:
    """Whether this process is in a process group."""
    return dist.is_initialized()


def exchange_limit_s(timeout_s: float) -> float:
    """How long one exchange may take: when it has failed, some of the time is needed to find out who is missing."""
    return timeout_s - min(10.0, timeout_s / 2)


def choose_device(world: World) -> torch.device:
    """A GPU for each rank of a host, or the CPU.

    Raises:
        UserError: There are GPUs, but fewer than ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if torch.cuda.device_count() == 1 and os.environ.get("CUDA_VISIBLE_DEVICES"):  # each process sees its own
        return torch.device("cuda", 0)
    if world.ranks_per_host > torch.cuda.device_count():
        raise UserError(
            f"{world.ranks_per_host} processes on this host, but {torch.cuda.device_count()} GPUs: start as many "
            "processes as GPUs, or set CUDA_VISIBLE_DEVICES= (empty) to train on the CPU"
        )
    return torch.device("cuda", world.local_rank)


def check_layout(config: RunConfig, world: World) -> Mesh:
    """The mesh of a run, before any group of processes is made.

    Raises:
        UserError: The configuration does not fit the number of processes.
    """
    num_experts = config.moe.num_experts if config.moe is not None else None
    size = config.parallel.expert_parallel_size
    if config.parallel.backend == "replicas" and size == "auto":
        size = 1
    return choose_mesh(world.size, world.rank, world.ranks_per_host, size, num_experts)


def check_precision(config: RunConfig, device: torch.device) -> None:
    """Refuses what the device cannot do.

    Raises:
        UserError: fp16 on a CPU.
    """
    if config.train.precision == "fp16" and device.type != "cuda":
        raise UserError("train.precision (fp16) needs a CUDA device; on a CPU use bf16 or fp32")


def available_cpus() -> int:
    """CPUs this process may run on, which a container or a launcher may have limited."""
    return len(os.sched_getaffinity(0))


def process_start_time() -> float:
    """Seconds since the epoch at which this process was started."""
    return float(psutil.Process().create_time())


def set_up_logging(rank: int = 0) -> None:
    """Log lines with the time, on standard error; of ranks above 0 only warnings, with the rank."""
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(message)s"
        if rank == 0
        else f"%(asctime)s %(levelname)s rank {rank}: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    for name in ("accelerate", "numba", "matplotlib", "PIL", "torch", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def _joined(world: World, timeout_s: float, limit_s: float) -> Iterator[Heartbeat]:
    """Inside, all ranks know each other's signs of life, and an error of one ends all."""
    heartbeat = join_run(world, timeout_s, limit_s)
    try:
        publish_build(heartbeat.store, world.rank)
        heartbeat.join(timeout_s)
        if world.rank == 0:
            compare_builds(heartbeat.store, world.size)
        heartbeat.wait_for_all(logger.debug, "comparing versions")
        yield heartbeat
    except Interrupted:
        raise
    except BaseException as error:
        with deaf_to_sigterm():
            told = heartbeat.settle(error)
        if told is error:
            raise
        raise told from None
    finally:
        heartbeat.stop()


@contextmanager
def _groups(
    config: RunConfig, world: World, heartbeat: Heartbeat, device: torch.device, limit_s: float
) -> Iterator[Control]:
    """Inside there is a default process group; one that is there already, somebody else's, stays."""
    opened = not dist.is_initialized()
    limit = timedelta(seconds=limit_s)
    if opened:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=heartbeat.store,
            rank=world.rank,
            world_size=world.size,
            timeout=limit,
        )
    group = dist.new_group(backend="gloo", timeout=limit) if device.type == "cuda" else None
    control = Control(world.rank, world.size, group, heartbeat)
    # A host whose launcher was started again may have been told to resume; the others' may restart without a word.
    alike = config.model_copy(update={"run": config.run.model_copy(update={"resume": False})})
    if not control.equal(zlib.crc32(config_to_yaml(alike).encode())):
        raise UserError(
            "the ranks have been started with different configurations: start all with the same file and overrides"
        )
    if not control.equal(world.ranks_per_host):
        raise UserError("hosts have different numbers of processes: start as many on each")
    if device.type == "cuda":
        _check_own_device(world, device, control)
    try:
        yield control
    except Interrupted:
        _part(control, heartbeat, opened)
        raise
    _part(control, heartbeat, opened)


def _check_own_device(world: World, device: torch.device, control: Control) -> None:
    # By its own name: in a container of its own, each process' GPU may be number 0.
    own = (world.rank // world.ranks_per_host, str(torch.cuda.get_device_properties(device).uuid))
    same = [rank for rank, other in enumerate(control.gather(own)) if other == own]
    if len(same) > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise UserError(
            f"ranks {', '.join(map(str, same))} have been given one GPU (CUDA_VISIBLE_DEVICES={visible}): give each "
            "process one of its own, or each all of them"
        )


def _part(control: Control, heartbeat: Heartbeat, opened: bool) -> None:
    """All ranks have come to the end, and nobody asks a store of one that has left."""
    heartbeat.at("the end")
    control.wait()
    heartbeat.stop()
    control.wait()
    if opened:
        dist.destroy_process_group()


@contextmanager
def _settings(runtime: Runtime) -> Iterator[None]:
    """Inside, torch has this run's threads and is deterministic."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    if runtime.device.type == "cuda":
        torch.cuda.set_device(runtime.device)
    torch.set_num_threads(runtime.num_threads)
    torch.use_deterministic_algorithms(runtime.device.type == "cpu")
    # Deterministic mode also fills every new tensor, which costs 10 % of a step; nothing here reads one unwritten.
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
