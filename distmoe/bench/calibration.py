"""Micro-measurements of this machine, the input of the cost model: products, a pointwise function, all-to-all."""

import statistics
import time
from collections.abc import Callable

import psutil
import torch
from torch.nn import functional as F

from distmoe.parallel.collectives import Communicators
from distmoe.parallel.control import Control
from distmoe.parallel.mesh import Mesh
from distmoe.parallel.spawn import run_on_processes
from distmoe.training.cost_model import Link, Machine

_SAMPLES = 9
_FEW_BYTES, _MANY_BYTES = 1024, 4 * 2**20


def measure_machine(world_size: int) -> Machine:
    """What each of ``world_size`` processes has that work at the same time on the CPUs of this machine, over gloo."""
    machine: Machine = run_on_processes(_measure_rank, world_size)[0]
    return machine


def _measure_rank(control: Control) -> Machine:
    probe = Probe(control, rows=1024, width=256, hidden=1024)
    for _ in range(_SAMPLES + 1):
        probe.sample()
    return probe.machine()


class Probe:
    """Measures the rates of a rank while all the others do the same. Collective.

    Args:
        control: Of the ranks.
        rows: Of the products of an MLP: (rows, width) x (width, hidden), and the two of its backward pass.
        width: See ``rows``.
        hidden: See ``rows``.
    """

    def __init__(self, control: Control, rows: int, width: int, hidden: int) -> None:
        self._control = control
        self._product_flops = 3 * 2.0 * rows * width * hidden
        x, weight, y = torch.randn(rows, width), torch.randn(width, hidden), torch.randn(rows, hidden)
        values = torch.randn(2**20)
        self._pointwise_bytes = 2.0 * values.nbytes
        size = control.world_size
        self._group = Communicators.of(Mesh(size, control.rank, size)).expert_parallel
        self._runs = {
            "products": lambda: (x @ weight, y @ weight.T, x.T @ y),
            "pointwise": lambda: F.gelu(values),
            "few": self._exchange(_FEW_BYTES),
            "many": self._exchange(_MANY_BYTES),
        }
        self._seconds: dict[str, list[float]] = {name: [] for name in self._runs}

    def sample(self) -> None:
        """Measures everything once; all ranks start together, and the slowest counts."""
        for name, run in self._runs.items():
            self._control.wait()
            start = time.perf_counter()
            run()
            self._seconds[name].append(self._control.largest([time.perf_counter() - start])[0])

    def machine(self) -> Machine:
        """Of the medians, the first sample aside, which warms up; the same on all ranks."""
        seconds = {name: statistics.median(values[1:]) for name, values in self._seconds.items()}
        size = self._control.world_size
        if size == 1:
            link = Link(bandwidth=float("inf"), latency_s=0.0)
        else:  # from two sizes of a message
            leaving = (size - 1) / size * (_MANY_BYTES - _FEW_BYTES)
            bandwidth = leaving / max(seconds["many"] - seconds["few"], 1e-9)
            link = Link(bandwidth, latency_s=seconds["few"] / (size - 1))
        return Machine(
            f"{size} processes on this machine, a thread each",
            flops=self._product_flops / seconds["products"],
            memory_bandwidth=self._pointwise_bytes / seconds["pointwise"],
            memory_bytes=psutil.virtual_memory().total / size,
            inside=link,
            between=Link(bandwidth=link.bandwidth, latency_s=link.latency_s),
        )

    def _exchange(self, num_bytes: int) -> Callable[[], object]:
        share = num_bytes // torch.float32.itemsize // self._group.size
        rows, splits = torch.zeros(share * self._group.size), [share] * self._group.size
        return lambda: self._group.exchange_rows(rows, splits, splits)
