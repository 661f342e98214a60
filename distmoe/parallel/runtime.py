"""The process a run lives in: device, threads, determinism, logging, signals."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import psutil
import torch

from distmoe.config import RunConfig
from distmoe.contracts import UserError

logger = logging.getLogger(__name__)

_LAUNCHER_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


@dataclass
class Runtime:
    """What a run knows about its process.

    Attributes:
        device: Where the model lives.
        rank: Position among all processes, from 0.
        world_size: Number of processes.
        expert_parallel_size: Processes that share one copy of the experts.
        num_threads: CPU threads of torch.
        restarts: How often a launcher has restarted this run.
        stop_signal: Number of the signal that asked the run to save and stop, or None.
        can_save: Whether somebody acts on ``stop_signal``; otherwise a signal stops the process at once.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    expert_parallel_size: int = 1
    num_threads: int = 1
    restarts: int = 0
    stop_signal: int | None = field(default=None)
    can_save: bool = False

    def synchronize(self) -> None:
        """Waits until the device has done what it was given; a CPU always has."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def saving_on_signal(self) -> Iterator[None]:
        """Inside, the first SIGINT or SIGTERM only sets :attr:`stop_signal`, for the loop to act on."""
        self.can_save = True
        try:
            yield
        finally:
            self.can_save = False


@contextmanager
def open_runtime(config: RunConfig) -> Iterator[Runtime]:
    """Sets threads and determinism, catches SIGINT and SIGTERM, and puts everything back on the way out.

    Inside :meth:`Runtime.saving_on_signal` the first signal is recorded in :attr:`Runtime.stop_signal` for the loop to
    act on at the end of a step. A second one, and any one outside, ends the process at once: ``KeyboardInterrupt`` or
    ``SystemExit`` with code 143.

    Raises:
        UserError: The configuration does not fit this machine or this number of processes.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    _check(config, device)
    num_threads = config.train.num_threads or available_cpus()
    restarts = _environment_number("TORCHELASTIC_RESTART_COUNT", 0)
    runtime = Runtime(device=device, num_threads=num_threads, restarts=restarts)
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(device.type == "cpu")
    # Deterministic mode also fills every new tensor, which costs 10 % of a step; nothing here reads one unwritten.
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        with _recorded_signals(runtime):
            yield runtime
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def available_cpus() -> int:
    """CPUs this process may run on, which a container or a launcher may have limited."""
    return len(os.sched_getaffinity(0))


def process_start_time() -> float:
    """Seconds since the epoch at which this process was started."""
    return float(psutil.Process().create_time())


@contextmanager
def without_launcher_variables() -> Iterator[None]:
    """Inside, a library that reads launchers' variables finds none: a run's settings come from its configuration.

    Accelerate would divide gradients by ``ACCELERATE_GRADIENT_ACCUMULATION_STEPS``, and open a process group for the
    one process of ``torchrun --nproc-per-node 1``.
    """
    hidden = {name for name in os.environ if name.startswith("ACCELERATE_") or name in _LAUNCHER_VARIABLES}
    kept = {name: os.environ.pop(name) for name in hidden}
    try:
        yield
    finally:
        os.environ.update(kept)


def set_up_logging() -> None:
    """Log lines with the time, on standard error; warnings of third parties stay, their chatter does not."""
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    for name in ("accelerate", "numba", "matplotlib", "PIL", "torch"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _check(config: RunConfig, device: torch.device) -> None:
    world_size = _environment_number("WORLD_SIZE", 1)
    if world_size != 1:
        raise UserError(
            f"WORLD_SIZE ({world_size}): this version trains in one process; start it without a launcher, "
            "or with one process (e.g. torchrun --nproc-per-node 1)"
        )
    size = config.parallel.expert_parallel_size
    if size not in ("auto", 1):
        raise UserError(
            f"parallel.expert_parallel_size ({size}) must divide the number of processes (1): set it to 1 or auto"
        )
    if config.train.precision == "fp16" and device.type != "cuda":
        raise UserError("train.precision (fp16) needs a CUDA device; on a CPU use bf16 or fp32")


def _environment_number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"environment variable {name} ({text!r}) must be a whole number; unset it or correct it")
    return int(text)


@contextmanager
def _recorded_signals(runtime: Runtime) -> Iterator[None]:
    def record(number: int, frame: FrameType | None) -> None:
        del frame
        if runtime.stop_signal is not None or not runtime.can_save:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        runtime.stop_signal = number
        logger.warning("%s: saving after this step, then stopping (again to stop at once)", signal.Signals(number).name)

    try:
        previous = {number: signal.signal(number, record) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are somebody else's business
        previous = {}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
