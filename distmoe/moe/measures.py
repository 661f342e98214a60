"""Measures of a routing, in bits: how sure the gate is, how evenly experts are used, what they know of the sample.

Everything starts from sums over tokens, float64 and without gradient, which add over micro-batches, batches and ranks,
and ends in numbers with their maxima (:func:`measure`). The sums by name:

* :func:`routing_sums`, cheap: ``tokens`` (), ``unassigned`` (), ``dropped`` (), ``assignments_E`` (E,), and for gates
  with probabilities ``distributions`` (), ``entropy`` (), ``probs_E`` (E,).
* :func:`table_sums`, tables (V, E) of a variable's V values (classes, cells of a factor) by expert, where gates have
  probabilities: ``NAME_favourite_VE`` counts each token at its most probable expert, ``NAME_soft_VE`` adds up the
  gate's probabilities. Other gates have ``NAME_assigned_VE``, which counts assignments.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from distmoe.moe.routing import Routing
from distmoe.moe.sums import Sums

DEAD_SHARE = 0.01  # an expert is called dead when it gets less than this share of an even load
MAX_FACTOR_COLUMNS = 8

# What the names of tables are made of.
_FACTOR, _FAVOURITE, _SOFT, _ASSIGNED = "factor_", "_favourite_VE", "_soft_VE", "_assigned_VE"

_MAGNITUDES = (
    *(eighth / 8 for eighth in range(1, 9)),
    *range(2, 33),
    *(2**octave * (1 + quarter / 4) for octave in range(5, 10) for quarter in range(1, 5)),
)
FACTOR_GRID = (*(-value for value in reversed(_MAGNITUDES)), 0.0, *_MAGNITUDES)
"""What values of a factor are rounded to: steps of 1/8 up to 1, of 1 up to 32, of a quarter of an octave up to 1024."""


class Measure(NamedTuple):
    """A number and the largest value it can have."""

    value: float
    maximum: float


class Cells(NamedTuple):
    """A variable as whole numbers.

    Attributes:
        ids_B: (B,) int64, the value of each sample, from 0.
        num_values: V.
    """

    ids_B: Tensor
    num_values: int


def routing_sums(routing: Routing) -> Sums:
    """What the tokens of one routing contribute to the measures that need no labels.

    Returns:
        ``tokens`` (), ``unassigned`` () tokens that no expert works on, ``dropped`` () assignments that capacity
        refused, ``assignments_E`` (E,); for gates with probabilities ``distributions`` () (one a token, or one a token
        and filter), ``entropy`` () their summed bits and ``probs_E`` (E,) their sum. Slots of Soft MoE are its
        assignments, and all of them are met.
    """
    routing = routing.detach()
    device = routing.row_ids_A.device
    tokens = routing.num_rows if routing.mixing is None else routing.mixing.groups.num_rows
    counts = {"tokens": tokens, "dropped": routing.num_dropped}
    sums = {name: torch.tensor(float(count), dtype=torch.float64, device=device) for name, count in counts.items()}
    rows_met = torch.bincount(routing.row_ids_A, minlength=routing.num_rows)
    sums["unassigned"] = (rows_met == 0).sum().double()
    sums["assignments_E"] = routing.rows_per_expert().double()
    probs_TE = routing.flat_probs
    if probs_TE is not None:
        sums["distributions"] = torch.tensor(float(len(probs_TE)), dtype=torch.float64, device=device)
        sums["entropy"] = torch.special.entr(probs_TE).sum(dtype=torch.float64) / math.log(2)
        sums["probs_E"] = probs_TE.sum(0, dtype=torch.float64)
    return sums


def factor_cells(factors: Mapping[str, Tensor]) -> dict[str, Cells]:
    """The factors of a batch, rounded to :data:`FACTOR_GRID`.

    The grid is fixed, so that tables of different batches and ranks have the same rows and add up: no rank has to see
    the data first. It fits what factors are: whole numbers (pixels of translation, categories, degrees) keep their
    value up to 32, and shares in [0, 1] or [-1, 1] (places, sizes) fall into steps of 1/8, coarse enough for a few
    thousand samples to fill a table of two of them. Larger values keep their order of magnitude; beyond 1024 they count
    as 1024. A value halfway between two of the grid counts as the lower one.

    Args:
        factors: Name -> (B,) or (B, F) numbers.

    Returns:
        ``factor_NAME`` for a factor of one column. Of two columns, such as a place or a translation, one variable for
        the pair, cell ``row * len(FACTOR_GRID) + column``: experts may tell pairs apart whose columns, each alone, say
        nothing. Of 3 to :data:`MAX_FACTOR_COLUMNS`, ``factor_NAME_0``, ``factor_NAME_1``, ..., one for each column;
        wider factors are left out.
    """
    size = len(FACTOR_GRID)
    found: dict[str, Cells] = {}
    for name, values in factors.items():
        edges = torch.tensor([(low + high) / 2 for low, high in pairwise(FACTOR_GRID)], device=values.device)
        table_BF = (values.unsqueeze(1) if values.dim() == 1 else values).float().contiguous()
        columns = torch.bucketize(table_BF, edges).unbind(1)
        if len(columns) == 1:
            found[_FACTOR + name] = Cells(columns[0], size)
        elif len(columns) == 2:
            found[_FACTOR + name] = Cells(columns[0] * size + columns[1], size * size)
        elif len(columns) <= MAX_FACTOR_COLUMNS:
            found |= {f"{_FACTOR}{name}_{number}": Cells(column, size) for number, column in enumerate(columns)}
    return found


def table_sums(routing: Routing, variables: Mapping[str, Cells]) -> Sums:
    """Tables of variables by expert; a token has its sample's values.

    Args:
        routing: Of the samples that have these values.
        variables: By name: ``class``, ``factor_translation``, ...

    Returns:
        ``NAME_favourite_VE`` and ``NAME_soft_VE`` for gates with probabilities, else ``NAME_assigned_VE``, each (V, E).
    """
    routing = routing.detach()
    probs_TE, num_experts = routing.flat_probs, routing.num_experts
    sums: Sums = {}
    if probs_TE is None or routing.probs_TE is None:
        for name, cells in variables.items():
            values_T = cells.ids_B.repeat_interleave(routing.rows_per_sample)
            sums[name + _ASSIGNED] = _counts(values_T[routing.row_ids_A], routing.expert_ids_A, cells, num_experts)
        return sums
    # A sample has several tokens, and with gates of filters or positions a token has several distributions.
    repeats = routing.rows_per_sample * routing.probs_TE.shape[1:-1].numel()
    favourites_T, weights_TE = probs_TE.argmax(-1), probs_TE.double()
    for name, cells in variables.items():
        values_T = cells.ids_B.repeat_interleave(repeats)
        sums[name + _FAVOURITE] = _counts(values_T, favourites_T, cells, num_experts)
        sums[name + _SOFT] = weights_TE.new_zeros(cells.num_values, num_experts).index_add_(0, values_T, weights_TE)
    return sums


def measure(sums: Sums) -> dict[str, Measure]:
    """Numbers of one layer, from whichever sums there are, each with its maximum.

    Returns:
        ``load_imbalance`` (largest load over mean load, 1 is even; at most E), ``dead_experts`` (at most E - 1),
        ``usage_entropy_bits`` (of the load; log2 E), ``dropped_share``, ``unassigned_share``.

        For gates with probabilities ``load_imbalance_soft``, ``dead_experts_soft`` and ``usage_entropy_soft_bits``, the
        same of the mean probabilities, which also tell something where every expert gets every token (the last one is
        H_u); and ``gate_entropy_bits``, the mean of a token's own entropy (H_s; log2 E).

        For each table of a variable Y ``Y_information_bits``, I(E;Y) of the most probable expert;
        ``Y_information_corrected_bits``, the same less its bias; ``Y_information_soft_bits``, of the gate's
        probabilities. At most log2 min(E, C) for classes, log2 min(E, cells that occur) for factors.

    Source: H_s, H_u: Krishnamurthy et al. 2023 (arXiv:2302.14703), as in the authors' code; their I(E;Y) is
    ``expert_predicted_class_information_bits``, with Y the class that the most probable expert predicts, not the true
    one.
    """
    load_E = sums["assignments_E"]
    num_experts = len(load_E)
    total = float(load_E.sum())
    dropped, unassigned = float(sums["dropped"]), float(sums["unassigned"])
    found = {
        **_evenness(load_E, ""),
        "dropped_share": Measure(dropped / max(total + dropped, 1.0), 1.0),
        "unassigned_share": Measure(unassigned / max(float(sums["tokens"]), 1.0), 1.0),
    }
    if "probs_E" in sums:
        entropy = float(sums["entropy"]) / max(float(sums["distributions"]), 1.0)
        found |= _evenness(sums["probs_E"], "_soft")
        found["gate_entropy_bits"] = Measure(entropy, math.log2(num_experts))
    for key, table_VE in sums.items():
        if key.endswith(_SOFT):
            name = key.removesuffix(_SOFT)
            bits = mutual_information_bits(table_VE)
            found[f"{name}_information_soft_bits"] = Measure(bits, _largest_information(name, table_VE))
        elif key.endswith(_FAVOURITE):
            name = key.removesuffix(_FAVOURITE)
            maximum = _largest_information(name, table_VE)
            corrected = min(corrected_information_bits(table_VE), maximum)
            found[f"{name}_information_bits"] = Measure(mutual_information_bits(table_VE), maximum)
            found[f"{name}_information_corrected_bits"] = Measure(corrected, maximum)
    return found


def describe_routing(sums: Sums) -> dict[str, float]:
    """The numbers of :func:`measure` alone."""
    return {name: one.value for name, one in measure(sums).items()}


def entropy_bits(weights: Tensor) -> float:
    """Entropy of non-negative weights, normalised to 1; 0 for all-zero weights."""
    total = weights.sum()
    if total <= 0:
        return 0.0
    return float(torch.special.entr(weights.double() / total).sum() / math.log(2))


def mutual_information_bits(table: Tensor) -> float:
    """I(row; column) of a (rows, columns) table of non-negative weights: H(row) + H(column) - H(row, column)."""
    information = entropy_bits(table.sum(1)) + entropy_bits(table.sum(0)) - entropy_bits(table.flatten())
    return max(information, 0.0)


def corrected_information_bits(counts: Tensor) -> float:
    """I(row; column) of a (rows, columns) table of counts, less what chance alone gives few counts; at least 0.

    Each entropy is corrected by ``(m - 1) / (2 N)`` nats, with m entries that occur and N counts. Part of the bias
    stays where there are fewer counts than entries, or where counts are not independent, as tokens of one image.

    Source: Miller 1955, "Note on the bias of information estimates" (Miller-Madow).
    """
    occurring = [int(weights.count_nonzero()) for weights in (counts.flatten(), counts.sum(1), counts.sum(0))]
    bias = (occurring[0] - occurring[1] - occurring[2] + 1) / (2 * max(float(counts.sum()), 1.0) * math.log(2))
    return max(mutual_information_bits(counts) - bias, 0.0)


def _evenness(load_E: Tensor, suffix: str) -> dict[str, Measure]:
    """How evenly a load is spread; of no load at all, nothing is known and everything is 0."""
    num_experts, even = len(load_E), float(load_E.mean())
    name = f"usage_entropy{suffix}_bits"
    return {
        f"load_imbalance{suffix}": Measure(float(load_E.max()) / even if even > 0 else 0.0, float(num_experts)),
        f"dead_experts{suffix}": Measure(float((load_E < DEAD_SHARE * even).sum()), num_experts - 1.0),
        name: Measure(entropy_bits(load_E), math.log2(num_experts)),
    }


def _largest_information(name: str, table_VE: Tensor) -> float:
    """Of classes all count, predicted or not; of a factor's cells, most of which are never used, those that occur."""
    num_values, num_experts = table_VE.shape
    if name.startswith(_FACTOR):
        num_values = int(table_VE.sum(1).count_nonzero())
    return math.log2(max(min(num_experts, num_values), 1))


def _counts(values: Tensor, experts: Tensor, cells: Cells, num_experts: int) -> Tensor:
    """(V, E) float64: how often each pair occurs."""
    table = torch.bincount(values * num_experts + experts, minlength=cells.num_values * num_experts)
    return table.view(cells.num_values, num_experts).double()
