"""Auxiliary losses of a routing, and the objectives of mixtures of class probabilities.

An auxiliary loss is of one micro-batch over all ranks. It comes in two halves: ``sums(routing)`` gives tensors that add
over tokens, a :class:`Reducer` adds them over ranks, and ``loss(sums)`` is a scalar that every rank computes alike.
All are unweighted: the weights of the config are applied once, in the training step.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from distmoe.moe.routing import Routing, at_least_float32

Sums = dict[str, Tensor]


class Reducer(Protocol):
    """Adds tensors over all ranks; the gradient of the sum reaches every rank's own share."""

    def __call__(self, sums: Sums) -> Sums:
        """Collective: every rank calls it, in the same order. Returns float32 sums."""
        ...


def no_reduction(sums: Sums) -> Sums:
    """The :class:`Reducer` of one process: the sums themselves."""
    return sums


def add_sums(totals: Sums, more: Sums) -> None:
    """Adds ``more`` to ``totals`` in place, name by name."""
    for name, value in more.items():
        totals[name] = totals[name] + value if name in totals else value


class AuxiliaryLoss(Protocol):
    """One scalar from the routings of all ranks."""

    def sums(self, routing: Routing) -> Sums:
        """What this rank's tokens contribute."""
        ...

    def loss(self, sums: Sums) -> Tensor:
        """The scalar, float32, unweighted."""
        ...


class LoadBalanceLoss:
    """1 where tokens spread evenly over the experts, up to E where all go to one.

    ``E * sum_e f_e * P_e`` with f_e the share of assignments and P_e the mean probability of expert e. Gradients flow
    through P only; f is a count, before capacity drops any.

    Source: Fedus et al. 2021, eq. 4-6 (arXiv:2101.03961). Differs: with k > 1 every choice counts.
    """

    def sums(self, routing: Routing) -> Sums:
        """Assignments and summed probabilities of each expert, and the number of rows."""
        probs_TE = _probs(routing)
        return {
            "assignments_E": routing.demand_per_expert().to(probs_TE),
            "probs_E": probs_TE.sum(0),
            "rows": probs_TE.new_tensor(float(len(probs_TE))),
        }

    def loss(self, sums: Sums) -> Tensor:
        """Scalar; 0 if no row was routed."""
        shares_E = sums["assignments_E"] / sums["assignments_E"].sum().clamp(min=1)
        means_E = sums["probs_E"] / sums["rows"].clamp(min=1)
        return len(shares_E) * (shares_E * means_E).sum()


class ImportanceLoss:
    """Squared coefficient of variation of the experts' importance ``I_e = sum_t p(e|t)``.

    ``(std(I) / mean(I))^2`` with the unbiased standard deviation; 0 for one expert.

    Source: Shazeer et al. 2017, eq. 6-7 (arXiv:1701.06538); unbiased as in Krishnamurthy et al.'s code.
    """

    def sums(self, routing: Routing) -> Sums:
        """Summed probabilities of each expert."""
        return {"probs_E": _probs(routing).sum(0)}

    def loss(self, sums: Sums) -> Tensor:
        """Scalar; 0 if no row was routed."""
        importance_E = sums["probs_E"]
        if len(importance_E) == 1:
            return importance_E.sum() * 0.0
        return importance_E.var() / importance_E.mean().square().clamp(min=torch.finfo(importance_E.dtype).tiny)


class ZLoss:
    """Mean over tokens of the squared log-sum-exp of the gate's logits: keeps them small.

    Source: Zoph et al. 2022, eq. 5 (arXiv:2202.08906).
    """

    def sums(self, routing: Routing) -> Sums:
        """Summed squares and the number of rows."""
        logits_TE = routing.flat_logits
        if logits_TE is None:
            raise ValueError("the z loss needs a gate with logits")
        return {
            "squares": logits_TE.logsumexp(-1).square().sum(),
            "rows": logits_TE.new_tensor(float(len(logits_TE))),
        }

    def loss(self, sums: Sums) -> Tensor:
        """Scalar; 0 if no row was routed."""
        return sums["squares"] / sums["rows"].clamp(min=1)


LOSSES: dict[str, AuxiliaryLoss] = {
    "load_balance": LoadBalanceLoss(),
    "importance": ImportanceLoss(),
    "z": ZLoss(),
}


def auxiliary_losses(
    routings: Mapping[str, Routing], weights: Mapping[str, float], reducer: Reducer = no_reduction
) -> dict[str, Tensor]:
    """Each loss with a weight above 0, unweighted, averaged over the layers. Collective, through ``reducer``."""
    losses = {}
    for name, weight in weights.items():
        if weight > 0 and routings:
            layers = [LOSSES[name].loss(reducer(LOSSES[name].sums(routing))) for routing in routings.values()]
            losses[name] = torch.stack(layers).mean()
    return losses


def mixture_log_probs(log_probs_AC: Tensor, routing: Routing) -> Tensor:
    """(T, C) log probabilities of a mixture of class distributions: ``log sum_e g_e(x) p_e(c|x)``.

    Computed as log-sum-exp of log gate + log probability, so that a confident gate does not underflow.

    Args:
        log_probs_AC: Log class probabilities of each assignment, in assignment order, row by row.
        routing: Of a dense gate, whose assignments are all experts of row 0, then of row 1, ...

    Source: Jacobs et al. 1991, the likelihood of the mixture; here with class probabilities instead of Gaussians.
    """
    if routing.logits_TE is None or len(log_probs_AC) != routing.num_rows * routing.num_experts:
        raise ValueError("a mixture of class probabilities needs a dense gate")
    log_gate_TE1 = routing.logits_TE.log_softmax(-1).unsqueeze(-1)
    log_probs_TEC = at_least_float32(log_probs_AC).unflatten(0, (routing.num_rows, routing.num_experts))
    return torch.logsumexp(log_gate_TE1 + log_probs_TEC, dim=1)


def negative_log_likelihood(log_probs_TC: Tensor, labels_T: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(T,) cross-entropy of log probabilities with the labels, ``label_smoothing`` of each target spread evenly."""
    picked_T = -log_probs_TC.gather(1, labels_T.unsqueeze(1)).squeeze(1)
    if label_smoothing == 0.0:
        return picked_T
    return (1.0 - label_smoothing) * picked_T - label_smoothing * log_probs_TC.mean(1)


def classification_losses(logits_TC: Tensor, labels_T: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(T,) softmax cross-entropy in float32 or wider."""
    return F.cross_entropy(at_least_float32(logits_TC), labels_T, reduction="none", label_smoothing=label_smoothing)


def _probs(routing: Routing) -> Tensor:
    probs_TE = routing.flat_probs
    if probs_TE is None:
        raise ValueError("this loss needs a gate with probabilities")
    return probs_TE
