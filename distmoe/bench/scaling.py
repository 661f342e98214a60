"""Speed and memory of an MoE layer whose experts are spread over processes, beside DeepSpeed's and the cost model's.

For each expert-parallel size, processes are started; in them both layers get the same tokens, routing and weights, and
must agree in outputs and gradients before they are timed. Each is measured once a round, and the rounds go through
them forwards and backwards in turn; so are the rates that the cost model starts from. All ranks start a measurement
together, and it takes as long as the slowest one. A step is forward, backward, and the sum of gradients over the ranks
that hold the same parameters.
"""

import importlib
import importlib.util
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distmoe.bench.calibration import Probe
from distmoe.bench.estimate import MIN_ROUNDS, estimate
from distmoe.bench.layer_candidates import Problem
from distmoe.bench.memory import peak_bytes
from distmoe.bench.scaling_candidates import Candidate, Point, Watch, build_problem, our_layer
from distmoe.bench.scaling_table import DEEPSPEED, OURS, Line, format_header, format_point, missed_floors
from distmoe.contracts import UserError
from distmoe.parallel.collectives import Communicators
from distmoe.parallel.control import Control
from distmoe.parallel.gradients import reduce_gradients
from distmoe.parallel.mesh import Mesh
from distmoe.parallel.spawn import run_on_processes
from distmoe.training.cost_model import Layout, Machine, MixtureWork, Prediction, Training, Workload, predict

_ROUND_SECONDS = 0.05  # fast steps are repeated in a round until it takes about this long
_MOST_REPEATS = 10
_TOLERANCE = 1e-4  # of the largest entry: rounding and orders of summation


@dataclass(frozen=True)
class RankResult:
    """What one rank measured of one candidate.

    Attributes:
        seconds: Of a step, by round.
        exchange_seconds: Of these, in exchanges.
        sent_bytes: To other ranks in a step, in exchanges of rows.
        expert_bytes: Parameters and gradients of the experts.
        peak_bytes: Parameters, and what a step takes beyond them.
    """

    seconds: list[float]
    exchange_seconds: list[float]
    sent_bytes: float
    expert_bytes: int
    peak_bytes: int


def bench_scaling(
    width: int,
    hidden: int,
    num_experts: int,
    ks: Sequence[int],
    num_tokens: int,
    sizes: Sequence[int],
    world_size: int | None,
    rounds: int,
) -> Iterator[str]:
    """Measures every expert-parallel size and k.

    Args:
        width: D.
        hidden: H.
        num_experts: E.
        ks: Experts a token.
        num_tokens: Of all ranks.
        sizes: Expert-parallel sizes.
        world_size: Number of processes; None: as many as the expert-parallel size.
        rounds: Measurements of each layer; at least 6, below which a median has no 95 % interval.

    Yields:
        Lines of the table as they are measured, and at last which floors were missed.

    Raises:
        UserError: A combination that cannot be.
    """
    points = [
        check_point(Point(width, hidden, num_experts, k, num_tokens, world_size or size, size))
        for size, k in itertools.product(sizes, ks)
    ]
    if rounds < MIN_ROUNDS:
        raise UserError(f"{rounds} rounds are too few for a 95 % interval: at least {MIN_ROUNDS} are needed")
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "bench scaling compares with DeepSpeed, which is not installed: pip install 'distmoe[deepspeed]'"
        )
    os.environ["DS_ACCELERATOR"] = "cpu"  # the new processes inherit it
    yield from format_header(points[0], rounds)
    missed: list[str] = []
    for _, group in itertools.groupby(points, key=lambda point: point.expert_parallel_size):
        chosen = list(group)
        results = run_on_processes(measure_points, chosen[0].world_size, chosen, rounds)
        for number, point in enumerate(chosen):
            machine: Machine = results[0][number][0]
            lines = summarize(point, {name: [rank[number][1][name] for rank in results] for name in (OURS, DEEPSPEED)})
            yield from format_point(point, lines, predicted(point, machine))
            missed += missed_floors(point, lines)
    yield f"\nfloors missed: {len(missed)}"
    yield from missed


def check_point(point: Point) -> Point:
    """The point itself.

    Raises:
        UserError: It cannot be computed, or not evenly.
    """
    numbers = {
        "width": point.width,
        "hidden": point.hidden,
        "k": point.k,
        "tokens": point.num_tokens,
        "world": point.world_size,
        "expert-parallel": point.expert_parallel_size,
    }
    for name, value in numbers.items():
        if value < 1:
            raise UserError(f"{name} {value}: must be 1 or more")
    size, world, experts = point.expert_parallel_size, point.world_size, point.num_experts
    if world % size or experts % size:
        raise UserError(f"expert-parallel {size}: must divide the {world} processes and the {experts} experts")
    if not point.k <= experts <= point.width:
        raise UserError(f"k {point.k}, experts {experts}, width {point.width}: must not fall from one to the next")
    if point.num_tokens % (world * experts):
        raise UserError(
            f"tokens {point.num_tokens}: must be a multiple of {world * experts}, processes times experts, so that the "
            "load is even"
        )
    return point


def measure_points(
    control: Control, points: Sequence[Point], rounds: int
) -> list[tuple[Machine, dict[str, RankResult]]]:
    """What this rank finds at points of one expert-parallel size. Collective."""
    peer = importlib.import_module("distmoe.bench.scaling_deepspeed")
    found = []
    for point in points:
        mesh = Mesh(control.world_size, control.rank, point.expert_parallel_size)
        rows = max(point.local_tokens * point.k // point.local_experts, 1)
        probe = Probe(control, rows, point.width, point.hidden)
        problem = build_problem(point, mesh)
        watches = {name: Watch() for name in (OURS, DEEPSPEED)}
        candidates = {
            OURS: our_layer(problem, mesh, watches[OURS]),
            DEEPSPEED: peer.deepspeed_moe(problem, mesh, watches[DEEPSPEED]),
        }
        communicators = Communicators.of(mesh)
        with peer.watched(watches[DEEPSPEED], point.expert_parallel_size):
            results = _measure(control, probe, candidates, problem, communicators, rounds)
        found.append((probe.machine(), results))
    return found


def _measure(
    control: Control,
    probe: Probe,
    candidates: dict[str, Candidate],
    problem: Problem,
    communicators: Communicators,
    rounds: int,
) -> dict[str, RankResult]:
    sent, peaks, agreed = {}, {}, {}
    for name, candidate in candidates.items():
        agreed[name], peaks[name] = _first_step(candidate, problem, communicators)
        sent[name] = candidate.watch.sent_bytes
    _check_agreement(agreed[DEEPSPEED], agreed[OURS])
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    exchanges: dict[str, list[float]] = {name: [] for name in candidates}
    names, repeats = list(candidates), 1
    for number in range(rounds + 1):
        probe.sample()
        for name in names if number % 2 else reversed(names):
            candidates[name].watch.seconds = 0.0
            control.wait()
            start = time.perf_counter()
            for _ in range(repeats):
                _step(candidates[name], problem, communicators)
            seconds[name].append((time.perf_counter() - start) / repeats)
            exchanges[name].append(candidates[name].watch.seconds / repeats)
        if number == 0:  # warms up, and tells how often to repeat
            slowest = control.largest([max(values[0] for values in seconds.values())])[0]
            repeats = min(max(int(_ROUND_SECONDS / slowest), 1), _MOST_REPEATS)
    return {
        name: RankResult(
            seconds[name][1:],
            exchanges[name][1:],
            sent[name],
            2 * sum(parameter.nbytes for parameter in candidate.experts),
            peaks[name] + sum(parameter.nbytes for parameter in candidate.module.parameters()),
        )
        for name, candidate in candidates.items()
    }


def _step(candidate: Candidate, problem: Problem, communicators: Communicators) -> Tensor:
    """Outputs; gradients are left where they belong. Collective."""
    problem.tokens.grad = None
    candidate.module.zero_grad()
    outputs = candidate.forward(problem.tokens)
    outputs.backward(problem.towards)
    reduce_gradients(candidate.module, communicators, candidate.experts)
    return outputs.detach()


def _first_step(candidate: Candidate, problem: Problem, communicators: Communicators) -> tuple[list[Tensor], int]:
    """Outputs, and gradients of tokens, experts and gate; the peak of memory beyond parameters and tokens."""
    outputs: list[Tensor] = []
    peak = peak_bytes(lambda: outputs.append(_step(candidate, problem, communicators)), torch.device("cpu"))
    assert problem.tokens.grad is not None, "the outputs do not depend on the tokens"
    assert candidate.gate.grad is not None, "the outputs do not depend on the gate"
    return [*outputs, problem.tokens.grad, candidate.first_weights(), candidate.gate.grad], peak


def _check_agreement(found: list[Tensor], expected: list[Tensor]) -> None:
    for what, one, other in zip(("outputs", "tokens'", "experts'", "gate's"), found, expected, strict=True):
        difference = float((one - other).abs().max() / other.abs().max())
        if not difference <= _TOLERANCE:
            raise RuntimeError(f"{DEEPSPEED}: its {what} values are up to {difference:.2g} of the largest off ours")


def summarize(point: Point, results: dict[str, list[RankResult]]) -> list[Line]:
    """Lines of the table from what the ranks measured: the slowest rank's times, the bytes of all."""
    steps = {
        name: [max(times) for times in zip(*(one.seconds for one in ranks), strict=True)]
        for name, ranks in results.items()
    }
    lines = []
    for name, ranks in results.items():
        shares = [
            sum(one.exchange_seconds[number] for one in ranks) / len(ranks) / steps[name][number]
            for number in range(len(steps[name]))
        ]
        ratios = [theirs / ours for theirs, ours in zip(steps[name], steps[OURS], strict=True)]
        least = point.least_bytes()
        lines.append(
            Line(
                name,
                step=estimate(steps[name]),
                ratio=None if name == OURS else estimate(ratios),
                exchange_share=estimate(shares),
                bytes_ratio=sum(one.sent_bytes for one in ranks) / least if least else None,
                sent_bytes=sum(one.sent_bytes for one in ranks),
                expert_bytes=max(one.expert_bytes for one in ranks),
                peak_bytes=max(one.peak_bytes for one in ranks),
            )
        )
    return lines


def predicted(point: Point, machine: Machine) -> Prediction:
    """What the cost model says of our layer's step."""
    of_expert = point.width * point.hidden
    kept = point.width + point.k * (2 * point.width + 2 * point.hidden)  # x; and rows, outputs, hidden before and after
    workload = Workload(
        dense_parameters=point.num_experts * point.width,
        dense_flops=2.0 * point.num_experts * point.width,
        activation_values=kept,
        mixtures=(
            MixtureWork(
                point.num_experts,
                1.0,
                point.k,
                point.width,
                point.width,
                expert_parameters=2 * of_expert + point.hidden + point.width,
                expert_flops=4.0 * of_expert,
            ),
        ),
    )
    layout = Layout(point.world_size, point.world_size, point.expert_parallel_size)
    training = Training(samples=point.num_tokens, moments=0, updates=False)
    return predict(workload, training, layout, machine)
