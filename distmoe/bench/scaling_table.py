"""The table that ``bench scaling`` prints, and the floors that it holds the layer to."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from distmoe.bench.estimate import Estimate
from distmoe.bench.scaling_candidates import Point
from distmoe.training.cost_model import Prediction

OURS, DEEPSPEED = "distmoe", "DeepSpeed MoE"

DEEPSPEED_FLOOR = 0.97  # reached by the upper end of the interval


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        name: Of the candidate.
        step: Seconds, of the slowest rank.
        ratio: Speed of ours by that of this candidate; None for ours.
        exchange_share: Of a step's time in exchanges among ranks that share the experts, waiting for them included.
        sent_bytes: To other ranks in a step, of all ranks.
        bytes_ratio: That by the least possible; None where nothing has to be sent.
        expert_bytes: Parameters and gradients of the experts on a rank.
        peak_bytes: All parameters of a rank and what a step takes beyond them.
    """

    name: str
    step: Estimate
    ratio: Estimate | None
    exchange_share: Estimate
    sent_bytes: float
    bytes_ratio: float | None
    expert_bytes: int
    peak_bytes: int


_COLUMNS = (
    ("ranks", 5),
    ("EP", 3),
    ("k", 2),
    ("layer", 14),
    ("step, ms", 24),
    ("distmoe x", 21),
    ("in exchanges", 24),
    ("sent, MiB", 9),
    ("x least", 8),
    ("experts, MiB", 13),
    ("peak, MiB", 9),
    ("predicted, ms", 0),
)


def format_header(point: Point, rounds: int) -> Iterator[str]:
    """What was measured where, and the titles."""
    yield (
        f"D={point.width} H={point.hidden} E={point.num_experts}, {point.num_tokens:,} tokens over all ranks, fp32; "
        f"{len(os.sched_getaffinity(0))} CPU cores, a thread a rank, gloo, torch {torch.__version__}; {rounds} rounds, "
        "median and 95 % interval"
    )
    yield "step: forward, backward, sums of gradients; the slowest rank's. sent: rows to other ranks in a step, by all."
    yield "x least: each token once to each other rank that needs it, and once back. experts: parameters and gradients"
    yield "on a rank. peak: all parameters of a rank and what a step takes. predicted: by the cost model from the rates"
    yield "of products, of a pointwise function and of all-to-all alone, and its error."
    yield ""
    yield _aligned([title for title, _ in _COLUMNS])


def format_point(point: Point, lines: Sequence[Line], prediction: Prediction) -> Iterator[str]:
    """One line a candidate."""
    for line in lines:
        error = prediction.step_s / line.step.median - 1.0
        yield _aligned(
            [
                str(point.world_size),
                str(point.expert_parallel_size),
                str(point.k),
                line.name,
                f"{1e3 * line.step.median:.1f} ({1e3 * line.step.low:.1f} to {1e3 * line.step.high:.1f})",
                _ratio(line.ratio),
                f"{line.exchange_share.median:.0%} ({line.exchange_share.low:.0%} to {line.exchange_share.high:.0%})",
                f"{line.sent_bytes / 2**20:.1f}",
                "-" if line.bytes_ratio is None else f"{line.bytes_ratio:.3f}",
                f"{line.expert_bytes / 2**20:.1f}",
                f"{line.peak_bytes / 2**20:.1f}",
                f"{1e3 * prediction.step_s:.1f} ({error:+.0%})" if line.name == OURS else "",
            ]
        )


def missed_floors(point: Point, lines: Sequence[Line]) -> list[str]:
    """The floors that ours does not reach here, in words."""
    where = f"ranks={point.world_size} EP={point.expert_parallel_size} k={point.k}"
    missed = [
        f"{where}: {_ratio(line.ratio)} x {line.name}, interval below {DEEPSPEED_FLOOR}"
        for line in lines
        if line.ratio is not None and line.ratio.high < DEEPSPEED_FLOOR
    ]
    of_expert = 2 * point.width * point.hidden + point.width + point.hidden
    share = 2 * torch.float32.itemsize * of_expert * point.local_experts
    missed += [
        f"{where}: {line.expert_bytes:,} bytes of experts on a rank, not the {share:,} of its share"
        for line in lines
        if line.name == OURS and line.expert_bytes != share
    ]
    return missed


def _ratio(ratio: Estimate | None) -> str:
    return "1" if ratio is None else f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def _aligned(cells: Sequence[str]) -> str:
    return " ".join(cell.ljust(width) for cell, (_, width) in zip(cells, _COLUMNS, strict=False)).rstrip()
