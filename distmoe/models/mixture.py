"""Mixtures of class probabilities: what the models share whose experts are classifiers of their own."""

import torch
from torch import Tensor

from distmoe.config import MoESection
from distmoe.contracts import Context
from distmoe.models.protocol import ModelOutput, Network
from distmoe.moe.dispatch import Placement
from distmoe.moe.experts import Experts
from distmoe.moe.gates.base import Gate
from distmoe.moe.objectives import ClassObjective, mixture_log_probs
from distmoe.moe.routing import Routing, at_least_float32

LAYER = "mixture"  # its name among the routings


class ClassMixture(Network):
    """``p(c|x) = sum_e g_e(x) softmax(expert_e(x))_c``.

    In training, ``moe.objective`` says what is minimised; scores and evaluation are always those of the mixture.

    Args:
        gate: One whose weights sum to 1 for every sample.
        experts: From samples to class scores (R, C), or (scores, hidden states) for an attentive gate.
        moe: The mixture's settings.
        placement: Where the experts live.
    """

    def __init__(self, gate: Gate, experts: Experts, moe: MoESection, placement: Placement) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.dispatcher = placement.dispatcher(moe.num_experts)
        gate.reducer = placement.reducer
        self.objective = moe.objective

    def gates(self) -> dict[str, Gate]:
        """See :class:`distmoe.models.protocol.Network`."""
        return {LAYER: self.gate}

    def mix(self, x: Tensor, context: Context) -> ModelOutput:
        """(B, ...) normalised samples to the log probabilities of the mixture."""
        context = context.within(LAYER)
        routing = self.gate.route(x, context)
        rows_R, rows_per_expert_L, plan = self.dispatcher.dispatch(x, routing.row_ids_A, routing.expert_ids_A)
        result = self.experts(rows_R, rows_per_expert_L)
        scores_R, hidden_R = result if isinstance(result, tuple) else (result, None)
        log_probs_R = at_least_float32(scores_R).log_softmax(-1)
        if hidden_R is None:
            log_probs_A = self.dispatcher.gather(log_probs_R, plan)
        else:
            log_probs_A, hidden_A = self.dispatcher.gather((log_probs_R, hidden_R), plan)
            routing = self.gate.weigh(routing, hidden_A)
        objective, favourites = None, None
        if not context.training:
            favourites = favourite_predictions(log_probs_A, routing)
        elif self.objective != "likelihood":
            objective = ClassObjective(self.objective, log_probs_A, routing, context)
        return ModelOutput(
            log_probs=mixture_log_probs(log_probs_A, routing),
            routings={LAYER: routing},
            objective=objective,
            favourite_predictions=favourites,
        )


@torch.no_grad()
def favourite_predictions(log_probs_AC: Tensor, routing: Routing) -> Tensor:
    """(T,) int64: the class that each token's expert with the largest weight predicts; the first one among equals."""
    assert routing.weights_A is not None, "this routing has not been weighed"
    if routing.num_rows == 0:
        return torch.zeros(0, dtype=torch.long, device=log_probs_AC.device)
    favourites_T = routing.weights_A.view(routing.num_rows, routing.assignments_per_row).argmax(-1)
    first_T = torch.arange(routing.num_rows, device=favourites_T.device) * routing.assignments_per_row
    return log_probs_AC[first_T + favourites_T].argmax(-1)
