"""Measures of a routing, in bits: how sure the gate is, how evenly experts are used, what they know of the class.

Everything starts from sums over tokens (:func:`routing_sums`), which a reducer can add over ranks and batches, and
ends in numbers (:func:`describe_routing`). Maxima: log2 E for the entropies, log2 min(E, C) for the informations.
"""

import math

import torch
from torch import Tensor

from distmoe.moe.losses import Sums
from distmoe.moe.routing import Routing

DEAD_SHARE = 0.01  # an expert is called dead when it gets less than this share of an even load


def routing_sums(routing: Routing) -> Sums:
    """What the tokens of one routing contribute to its measures, float64, without gradient.

    Returns:
        ``rows`` (), ``assignments_E`` (E,), ``dropped`` (), and for gates with probabilities ``distributions`` () and
        ``entropy`` () summed bits of each of them (one a token, or one a token and filter).
    """
    routing = routing.detach()
    sums = {
        "rows": torch.tensor(float(routing.num_rows), dtype=torch.float64, device=routing.row_ids_A.device),
        "assignments_E": routing.rows_per_expert().double(),
        "dropped": torch.tensor(float(routing.num_dropped), dtype=torch.float64, device=routing.row_ids_A.device),
    }
    probs = routing.flat_probs
    if probs is not None:
        sums["distributions"] = torch.tensor(float(len(probs)), dtype=torch.float64, device=probs.device)
        sums["entropy"] = torch.special.entr(probs).sum().double() / math.log(2)
    return sums


def label_sums(routing: Routing, labels_B: Tensor, num_classes: int) -> Sums:
    """Tables of classes against experts, float64, without gradient.

    Args:
        routing: Of the samples with these labels; a token has its sample's label.
        labels_B: (B,) int64.
        num_classes: C.

    Returns:
        ``assigned_CE`` (C, E) counts of assignments, ``favourite_CE`` (C, E) counts of each token's most probable
        expert, ``soft_CE`` (C, E) summed gate probabilities; the last two only for gates with probabilities.
    """
    routing = routing.detach()
    labels_T = labels_B.repeat_interleave(routing.rows_per_sample)
    num_experts = routing.num_experts
    cells_A = labels_T[routing.row_ids_A] * num_experts + routing.expert_ids_A
    table = torch.bincount(cells_A, minlength=num_classes * num_experts).double()
    sums = {"assigned_CE": table.view(num_classes, num_experts)}
    probs_TE = routing.flat_probs
    if probs_TE is not None:
        labels_T = labels_T.repeat_interleave(len(probs_TE) // max(routing.num_rows, 1))
        favourites_T = labels_T * num_experts + probs_TE.argmax(-1)
        counts = torch.bincount(favourites_T, minlength=num_classes * num_experts).double()
        sums["favourite_CE"] = counts.view(num_classes, num_experts)
        soft_CE = torch.zeros(num_classes, num_experts, dtype=torch.float64, device=labels_T.device)
        sums["soft_CE"] = soft_CE.index_add_(0, labels_T, probs_TE.double())
    return sums


def describe_routing(sums: Sums) -> dict[str, float]:
    """Numbers of one layer from its sums.

    Returns:
        ``load_imbalance`` (largest load over mean load, 1 is even), ``dead_experts``, ``usage_entropy_bits`` (of the
        load), ``dropped_share``, and where the sums hold them ``gate_entropy_bits`` (mean of a token's), and
        ``class_information_bits`` / ``class_information_soft_bits`` (I(E;Y) of the most probable expert, of the
        gate's probabilities, with true labels).
    """
    load_E = sums["assignments_E"]
    total = load_E.sum().clamp(min=1)
    even = total / len(load_E)
    wanted = total + sums["dropped"]
    numbers = {
        "load_imbalance": float(load_E.max() / even),
        "dead_experts": float((load_E < DEAD_SHARE * even).sum()),
        "usage_entropy_bits": entropy_bits(load_E),
        "dropped_share": float(sums["dropped"] / wanted),
    }
    if "entropy" in sums:
        numbers["gate_entropy_bits"] = float(sums["entropy"] / sums["distributions"].clamp(min=1))
    if "favourite_CE" in sums:
        numbers["class_information_bits"] = mutual_information_bits(sums["favourite_CE"])
        numbers["class_information_soft_bits"] = mutual_information_bits(sums["soft_CE"])
    return numbers


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
