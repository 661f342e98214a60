"""Auxiliary losses of a routing.

An auxiliary loss is of one micro-batch over all ranks: a scalar that every rank computes alike. Most come in two
halves: ``sums(routing)`` gives tensors that add over tokens, a :class:`distmoe.moe.sums.Reducer` adds them over ranks,
and ``loss(sums)`` is the scalar. All are unweighted: the weights of the config are applied once, in the training step.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from distmoe.config import MoESection
from distmoe.moe.choices import check_choice
from distmoe.moe.routing import Routing
from distmoe.moe.similarity import Distance, Form, similarity_terms
from distmoe.moe.sums import Reducer, Sums, no_reduction

Pairs = Literal["within", "between"]


class AuxiliaryLoss(ABC):
    """One scalar from the routings of all ranks."""

    @abstractmethod
    def value(self, routing: Routing, inputs_B: Tensor | None = None, reducer: Reducer = no_reduction) -> Tensor:
        """The loss over all ranks, float32 or wider, unweighted. Collective.

        Args:
            routing: Of this rank's tokens.
            inputs_B: (B, ...) the samples they come from, for losses that compare inputs.
            reducer: Adds and gathers over ranks.

        Raises:
            ValueError: The gate does not give what the loss is made of.
        """


class AdditiveLoss(AuxiliaryLoss):
    """A loss that is a function of sums over tokens."""

    @abstractmethod
    def sums(self, routing: Routing) -> Sums:
        """What this rank's tokens contribute."""

    @abstractmethod
    def loss(self, sums: Sums) -> Tensor:
        """The scalar, given the sums over all ranks."""

    def value(self, routing: Routing, inputs_B: Tensor | None = None, reducer: Reducer = no_reduction) -> Tensor:
        """See :class:`AuxiliaryLoss`."""
        del inputs_B
        return self.loss(reducer(self.sums(routing)))


class LoadBalanceLoss(AdditiveLoss):
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


class ImportanceLoss(AdditiveLoss):
    """Squared coefficient of variation of the experts' importance ``I_e = sum_t p(e|t)``.

    ``(std(I) / mean(I))^2`` with the unbiased standard deviation; 0 for one expert.

    Source: Shazeer et al. 2017, eq. 6-7 (arXiv:1701.06538); unbiased as in Krishnamurthy et al.'s code.
    """

    def sums(self, routing: Routing) -> Sums:
        """Summed probabilities of each expert."""
        return {"probs_E": _probs(routing).sum(0)}

    def loss(self, sums: Sums) -> Tensor:
        """Scalar; 0 if no row was routed."""
        return squared_variation(sums["probs_E"])


class LoadLoss(AdditiveLoss):
    """Squared coefficient of variation of the experts' estimated load: ``L_e = sum_t P(t chooses e)``.

    Of noisy gates in training, whose routing holds the estimate; elsewhere nothing is drawn, and the loss is 0.

    Source: Shazeer et al. 2017, appendix A, eq. 10-11 (arXiv:1701.06538); unbiased as :class:`ImportanceLoss`.
    """

    def sums(self, routing: Routing) -> Sums:
        """Summed chances of each expert."""
        if routing.load_TE is None:
            return {"load_E": _probs(routing).new_zeros(routing.num_experts)}
        return {"load_E": routing.load_TE.sum(0)}

    def loss(self, sums: Sums) -> Tensor:
        """Scalar; 0 if no row was routed."""
        return squared_variation(sums["load_E"])


def squared_variation(values_E: Tensor) -> Tensor:
    """``(std / mean)^2`` with the unbiased standard deviation; 0 for one value, and where all are zero."""
    if len(values_E) == 1:
        return values_E.sum() * 0.0
    return values_E.var() / values_E.mean().square().clamp(min=torch.finfo(values_E.dtype).tiny)


class ZLoss(AdditiveLoss):
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


class SimilarityLoss(AuxiliaryLoss):
    """One of the two terms of the sample-similarity loss L_s, see :func:`distmoe.moe.similarity.similarity_terms`.

    Args:
        pairs: ``within``: samples of one expert, which should be alike; ``between``: samples of different experts,
            which should not.
        form: As there.
        distance: As there.

    Raises:
        ValueError: An unknown name.
    """

    def __init__(self, pairs: Pairs, form: Form = "paper", distance: Distance = "pixels") -> None:
        check_choice("pairs", pairs, get_args(Pairs))
        check_choice("form", form, get_args(Form))
        check_choice("distance", distance, get_args(Distance))
        self.pairs: Pairs = pairs
        self.form: Form = form
        self.distance: Distance = distance

    def value(self, routing: Routing, inputs_B: Tensor | None = None, reducer: Reducer = no_reduction) -> Tensor:
        """See :class:`AuxiliaryLoss`; 0 for fewer than two tokens."""
        within, between = similarity_terms(routing, inputs_B, reducer, self.form, self.distance)
        return within if self.pairs == "within" else between


LOSSES: dict[str, Callable[[MoESection], AuxiliaryLoss]] = {
    "load_balance": lambda section: LoadBalanceLoss(),
    "importance": lambda section: ImportanceLoss(),
    "load": lambda section: LoadLoss(),
    "z": lambda section: ZLoss(),
    "similarity_within": lambda section: SimilarityLoss("within", **section.similarity.model_dump()),
    "similarity_between": lambda section: SimilarityLoss("between", **section.similarity.model_dump()),
}


def build_losses(section: MoESection) -> dict[str, AuxiliaryLoss]:
    """The losses with a weight above 0 in ``moe.loss_weights``."""
    weights = section.loss_weights.model_dump()
    return {name: build(section) for name, build in LOSSES.items() if weights[name] > 0}


def auxiliary_losses(
    routings: Mapping[str, Routing],
    losses: Mapping[str, AuxiliaryLoss],
    inputs_B: Tensor | None = None,
    reducer: Reducer = no_reduction,
) -> dict[str, Tensor]:
    """Each loss, unweighted, averaged over the layers. Collective: ``reducer`` is called once for all additive ones."""
    additive = {name: loss for name, loss in losses.items() if isinstance(loss, AdditiveLoss)}
    places = [(name, layer) for name in additive for layer in routings]
    own = {place: additive[place[0]].sums(routings[place[1]]) for place in places}
    sums_of_all = {" ".join((*place, key)): value for place in places for key, value in own[place].items()}
    reduced = reducer(sums_of_all) if places else {}
    values = {}
    for name, loss in losses.items() if routings else ():
        if name in additive:
            sums = [{key: reduced[" ".join((name, layer, key))] for key in own[name, layer]} for layer in routings]
            values[name] = torch.stack([additive[name].loss(one) for one in sums]).mean()
        else:
            values[name] = torch.stack([loss.value(one, inputs_B, reducer) for one in routings.values()]).mean()
    return values


def _probs(routing: Routing) -> Tensor:
    probs_TE = routing.flat_probs
    if probs_TE is None:
        raise ValueError("this loss needs a gate with probabilities")
    return probs_TE
