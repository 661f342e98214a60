"""Speed and memory of one MoE layer beside DeepSpeed's, a naive loop and a dense MLP of equal active FLOPs.

All candidates of a shape get the same tokens, routing and weights, and must agree before they are timed. Each is
measured once a round, and the rounds go through them forwards and backwards in turn, so that a machine that slows down
for a while slows all of them. Ratios are taken inside a round.
"""

import importlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from distmoe.bench.estimate import MIN_ROUNDS, estimate
from distmoe.bench.layer_candidates import (
    Candidate,
    Load,
    Problem,
    Shape,
    build_problem,
    dense_mlp,
    masked_loop,
    our_layer,
)
from distmoe.bench.layer_table import (
    DEEPSPEED,
    DENSE,
    LOOP,
    OURS,
    Line,
    Measured,
    Skipped,
    format_header,
    format_lines,
    missed_floors,
)
from distmoe.bench.memory import peak_bytes
from distmoe.contracts import UserError

_WIDE = 256  # above this width an expert's hidden layer is as wide as a token, otherwise four times as wide
_ROWS = 256  # an expert, where all candidates can keep up
_FEWEST_ROWS = 8
_CPU_FLOPS = 210e9  # of the slowest candidate's step: about 1.5 s on two cores; an even load of the widest fits
_ROUND_SECONDS = 0.2  # fast steps are repeated in a round until it takes about this long
_MOST_REPEATS = 10
_MEMORY_SHARE = 0.8  # of the free memory that a candidate may take
_LOADS: tuple[Load, ...] = ("balanced", "skewed")
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TOLERANCES = {"fp32": 1e-4, "bf16": 0.05}  # of the largest entry: rounding and orders of summation


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        rounds: Measurements of each candidate; at least 6, below which a median has no 95 % interval.
        device: Where.
        precision: Of the matrix products, ``fp32`` or ``bf16``, the latter by autocast over float32 weights.
    """

    rounds: int
    device: torch.device
    precision: str

    def autocast(self) -> AbstractContextManager[object]:
        """The context of a forward pass."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_PRECISIONS[self.precision])

    def synchronize(self) -> None:
        """Waits for a GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Entry:
    """A line of the table before it is measured.

    Attributes:
        name: Of the candidate.
        build: Makes it.
        is_mixture: Whether it must give what ours gives.
        needed_bytes: Memory that a step takes at least, where that may be more than there is.
    """

    name: str
    build: Callable[[Problem], Candidate]
    is_mixture: bool = True
    needed_bytes: Callable[[Shape], int] | None = None


def bench_layer(
    widths: Sequence[int],
    experts: Sequence[int],
    ks: Sequence[int],
    loads: Sequence[str],
    rounds: int = 6,
    hidden: int | None = None,
    rows_per_expert: int | None = None,
    device: str | None = None,
    precision: str | None = None,
) -> Iterator[str]:
    """Measures every combination of widths D, experts E, k and load.

    Args:
        widths: D.
        experts: E.
        ks: k.
        loads: See :class:`distmoe.bench.layer_candidates.Shape`.
        rounds: See :class:`Settings`.
        hidden: H; None: 4 D up to a width of 256, then D.
        rows_per_expert: Rows an expert gets on average; None: 256, on a CPU fewer where the slowest candidate would
            take long.
        device: ``cpu`` or ``cuda``; None: a GPU where there is one.
        precision: ``fp32`` or ``bf16``; None: fp32 on a CPU, bf16 on a GPU.

    Yields:
        Lines of the table as they are measured, and at last which floors were missed.

    Raises:
        UserError: A combination that cannot be, a device that is not there.
    """
    settings = read_settings(rounds, device, precision)
    shapes = [
        choose_shape(width, num_experts, k, load, hidden, rows_per_expert, settings.device)
        for width, num_experts, load, k in itertools.product(widths, experts, loads, ks)
    ]
    entries = find_entries()
    yield from format_header(settings.rounds, settings.device, settings.precision)
    missed: list[str] = []
    for shape in shapes:
        lines = measure_layer(shape, settings, entries)
        yield from format_lines(shape, lines)
        missed += missed_floors(shape, lines)
    yield f"\nfloors missed: {len(missed)}"
    yield from missed


def read_settings(rounds: int, device: str | None, precision: str | None) -> Settings:
    """See :func:`bench_layer`.

    Raises:
        UserError: As there.
    """
    if rounds < MIN_ROUNDS:
        raise UserError(f"{rounds} rounds are too few for a 95 % interval: at least {MIN_ROUNDS} are needed")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    device = device or devices[-1]
    precision = precision or ("fp32" if device == "cpu" else "bf16")
    for name, value, allowed in (("device", device, devices), ("precision", precision, list(_PRECISIONS))):
        if value not in allowed:
            raise UserError(f"{name} {value}: must be {' or '.join(allowed)} here")
    return Settings(rounds, torch.device(device), precision)


def choose_shape(
    width: int,
    num_experts: int,
    k: int,
    load: str,
    hidden: int | None,
    rows_per_expert: int | None,
    device: torch.device,
) -> Shape:
    """As many tokens as give an expert ``rows_per_expert`` rows on average; see :func:`bench_layer`.

    Raises:
        UserError: A number below 1; more choices than experts, or more experts than a token has values, which hold the
            logits; an unknown load, or a skewed one of a single expert.
    """
    numbers = {"width": width, "experts": num_experts, "k": k, "hidden": hidden, "rows-per-expert": rows_per_expert}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: must be 1 or more")
    if not k <= num_experts <= width:
        raise UserError(f"k {k}, experts {num_experts}, width {width}: must not fall from one to the next")
    known = next((known for known in _LOADS if known == load), None)
    if known is None or (known == "skewed" and num_experts == 1):
        raise UserError(f"load {load} of {num_experts} experts: must be balanced, or skewed with 2 experts or more")

    def shape_of(rows: int) -> Shape:
        num_tokens = max(rows * num_experts // k, 1)
        return Shape(width, hidden or width * (1 if width > _WIDE else 4), num_experts, k, known, num_tokens)

    if rows_per_expert is not None or device.type != "cpu":
        return shape_of(rows_per_expert or _ROWS)
    rows = _ROWS
    while rows > _FEWEST_ROWS and _padded_flops(shape_of(rows)) > _CPU_FLOPS:
        rows //= 2
    return shape_of(rows)


def _padded_flops(shape: Shape) -> float:
    """Of a step in which every expert is padded to the fullest: two products forward, four backward."""
    return 6 * 2.0 * shape.width * shape.hidden * shape.num_experts * shape.most_rows


def find_entries() -> list[Entry]:
    """Ours first, then the peers that can be imported."""
    entries = [Entry(OURS, our_layer), Entry(LOOP, masked_loop), Entry(DENSE, dense_mlp, is_mixture=False)]
    try:
        module = importlib.import_module("distmoe.bench.layer_deepspeed")
    except ImportError:
        return entries
    entries.insert(1, Entry(DEEPSPEED, module.deepspeed_moe, needed_bytes=module.deepspeed_bytes))
    return entries


def measure_layer(shape: Shape, settings: Settings, entries: Sequence[Entry]) -> list[Line]:
    """One comparison.

    Args:
        shape: What to compute.
        settings: How to measure.
        entries: Whom, ours first.

    Raises:
        RuntimeError: A mixture whose outputs or gradients differ from ours.
    """
    problem = build_problem(shape, settings.device)
    candidates: dict[str, Candidate] = {}
    peaks: dict[str, int] = {}
    skipped: dict[str, Line] = {}
    expected: list[Tensor] = []
    for entry in entries:
        needed = entry.needed_bytes(shape) if entry.needed_bytes else 0
        if needed > _MEMORY_SHARE * _free_bytes(settings.device):
            skipped[entry.name] = Skipped(entry.name, f"out of memory: takes {needed / 2**30:,.1f} GiB or more")
            continue
        try:
            candidate = entry.build(problem)
            found, peaks[entry.name] = _first_step(candidate, problem, settings)
        except torch.OutOfMemoryError:
            skipped[entry.name] = Skipped(entry.name, "out of memory")
            continue
        expected = expected or found
        if entry.is_mixture:
            _check_agreement(entry.name, found, expected, _TOLERANCES[settings.precision])
        candidates[entry.name] = candidate
    seconds = _measure(candidates, problem, settings)
    measured = {name: _line(name, shape.num_tokens, seconds, peaks[name]) for name in candidates}
    return [skipped.get(entry.name) or measured[entry.name] for entry in entries]


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def _step(candidate: Candidate, problem: Problem, settings: Settings) -> tuple[Tensor, float, float]:
    """Outputs; seconds of the forward pass, and of forward and backward pass. Gradients start from None."""
    problem.tokens.grad = None
    candidate.module.zero_grad()
    settings.synchronize()
    start = time.perf_counter()
    with settings.autocast():
        outputs = candidate.forward(problem.tokens)
    settings.synchronize()
    forward = time.perf_counter() - start
    outputs.backward(problem.towards.to(outputs.dtype))
    settings.synchronize()
    return outputs.detach(), forward, time.perf_counter() - start


def _first_step(candidate: Candidate, problem: Problem, settings: Settings) -> tuple[list[Tensor], int]:
    """Outputs and gradients of the tokens; the peak of memory."""
    results: list[Tensor] = []

    def run() -> None:
        results.append(_step(candidate, problem, settings)[0])

    peak = peak_bytes(run, settings.device)
    assert problem.tokens.grad is not None, "the outputs do not depend on the tokens"
    return [*results, problem.tokens.grad], peak


def _check_agreement(name: str, found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for what, one, other in zip(("outputs", "gradients"), found, expected, strict=True):
        difference = float((one.float() - other.float()).abs().max() / other.float().abs().max())
        if not difference <= tolerance:
            raise RuntimeError(f"{name}: its {what} are up to {difference:.2g} of the largest off ours")


def _measure(
    candidates: dict[str, Candidate], problem: Problem, settings: Settings
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of a forward pass and of a step, by candidate and round; a first round warms up and is not returned."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    names, repeats = list(candidates), 1
    for number in range(settings.rounds + 1):
        for name in names if number % 2 else reversed(names):
            steps = [_step(candidates[name], problem, settings)[1:] for _ in range(repeats)]
            forward, both = (sum(column) / repeats for column in zip(*steps, strict=True))
            seconds[name].append((forward, both))
        if number == 0:
            slowest = max(values[0][1] for values in seconds.values())
            repeats = min(max(int(_ROUND_SECONDS / slowest), 1), _MOST_REPEATS)
    return {name: values[1:] for name, values in seconds.items()}


def _line(name: str, num_tokens: int, seconds: dict[str, list[tuple[float, float]]], peak: int) -> Measured:
    forward, step = (estimate([num_tokens / value for value in column]) for column in zip(*seconds[name], strict=True))
    if name == OURS:
        return Measured(name, forward, step, None, None, peak)
    rounds = zip(seconds[name], seconds[OURS], strict=True)
    ratios = zip(*((one[0] / other[0], one[1] / other[1]) for one, other in rounds), strict=True)
    forward_ratio, step_ratio = (estimate(column) for column in ratios)
    return Measured(name, forward, step, forward_ratio, step_ratio, peak)
