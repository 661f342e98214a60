"""The table that ``bench layer`` prints, and the floors that it holds the layer to."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from distmoe.bench.estimate import Estimate
from distmoe.bench.layer_candidates import Shape

OURS, DEEPSPEED, LOOP, DENSE = "distmoe", "DeepSpeed MoE", "loop over masks", "dense MLP"

DEEPSPEED_FLOOR = 0.97  # reached by the upper end of the interval
SKEWED_FLOOR = 3.0  # by the median; with 8 experts and k=4, padding costs a factor of 2 and no more
DENSE_FLOOR = 0.95  # by the median, from as many rows an expert on average as the next line says
DENSE_ROWS = 256


@dataclass(frozen=True)
class Measured:
    """One line of the table.

    Attributes:
        name: Of the candidate.
        forward: Tokens a second, forward pass of a training step.
        step: Tokens a second, forward and backward pass.
        forward_ratio: Speed of ours by that of this candidate; None for ours.
        step_ratio: The same of forward and backward pass.
        peak_bytes: Memory at the peak of a step beyond weights and tokens, gradients included.
    """

    name: str
    forward: Estimate
    step: Estimate
    forward_ratio: Estimate | None
    step_ratio: Estimate | None
    peak_bytes: int


@dataclass(frozen=True)
class Skipped:
    """A line without numbers: who could not run, and why."""

    name: str
    reason: str


Line = Measured | Skipped

_COLUMNS = (
    ("D", 5),
    ("H", 5),
    ("E", 4),
    ("k", 2),
    ("load", 9),
    ("tokens", 7),
    ("rows/expert", 12),
    ("padded", 7),
    ("layer", 16),
    ("forward, tokens/s", 33),
    ("distmoe x", 22),
    ("forward + backward, tokens/s", 33),
    ("distmoe x", 22),
    ("peak MiB", 0),
)


def format_header(rounds: int, device: torch.device, precision: str) -> Iterator[str]:
    """What was measured where, and the titles."""
    where = f"{len(os.sched_getaffinity(0))} CPU cores, {torch.get_num_threads()} torch threads"
    counted = "tensors that operations give"
    if device.type == "cuda":
        where, counted = torch.cuda.get_device_name(device), "the GPU's allocator"
    yield f"{where}, torch {torch.__version__}, {precision}, {rounds} rounds; median and 95 % interval"
    yield "balanced: equal rows for every expert. skewed: one gets every token (k=1: half), the others share the rest."
    yield "rows/expert: on average. padded: rows of a layer that pads every expert to the fullest, by ours."
    yield f"forward: of a training step. dense MLP: hidden width k H. peak: beyond weights and tokens, by {counted}."
    yield ""
    yield _aligned([title for title, _ in _COLUMNS])


def format_lines(shape: Shape, lines: Sequence[Line]) -> Iterator[str]:
    """One line a candidate."""
    about = [shape.width, shape.hidden, shape.num_experts, shape.k, shape.load, f"{shape.num_tokens:,}"]
    for line in lines:
        cells = [*map(str, about), f"{shape.rows_per_expert:,.0f}", f"{shape.padding:.1f} x", line.name]
        if isinstance(line, Skipped):
            yield _aligned([*cells, line.reason])
            continue
        numbers = [_speed(line.forward), _ratio(line.forward_ratio), _speed(line.step), _ratio(line.step_ratio)]
        yield _aligned([*cells, *numbers, f"{line.peak_bytes / 2**20:,.0f}"])


def missed_floors(shape: Shape, lines: Sequence[Line]) -> list[str]:
    """The floors that ours does not reach here, in words."""
    missed = []
    for line in lines:
        if isinstance(line, Skipped):
            continue
        for what, ratio in (("forward", line.forward_ratio), ("forward + backward", line.step_ratio)):
            for text in [] if ratio is None else _missed(shape, line.name, ratio):
                missed.append(f"D={shape.width} E={shape.num_experts} k={shape.k} {shape.load}, {what}: {text}")
    return missed


def _missed(shape: Shape, name: str, ratio: Estimate) -> Iterator[str]:
    said = f"{_ratio(ratio)} x {name}"
    if name == DEEPSPEED and ratio.high < DEEPSPEED_FLOOR:
        yield f"{said}, interval below {DEEPSPEED_FLOOR}"
    if name == DEEPSPEED and shape.load == "skewed" and ratio.median < SKEWED_FLOOR:
        yield f"{said}, below {SKEWED_FLOOR}"
    if name == DENSE and shape.rows_per_expert >= DENSE_ROWS and ratio.median < DENSE_FLOOR:
        yield f"{said}, below {DENSE_FLOOR}"


def _aligned(cells: Sequence[str]) -> str:
    return " ".join(cell.ljust(width) for cell, (_, width) in zip(cells, _COLUMNS, strict=False)).rstrip()


def _speed(value: Estimate) -> str:
    return f"{value.median:,.0f} ({value.low:,.0f} to {value.high:,.0f})"


def _ratio(value: Estimate | None) -> str:
    return "1" if value is None else f"{value.median:.3g} ({value.low:.3g} to {value.high:.3g})"
