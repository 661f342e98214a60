"""Balancing without a loss: state of a gate that depends on what it has routed so far.

A balancer keeps registered buffers, so they are saved, and changes them once an optimizer step only, from sums over
all ranks and micro-batches: they are equal on every rank and in every layout.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from distmoe.contracts import Context
from distmoe.moe.routing import Routing
from distmoe.moe.sums import Sums


class Balancer(nn.Module, ABC):
    """Sums over tokens in every forward pass of a step; one update after the optimizer's.

    The training loop of this package sees to it. In a loop of your own, after ``optimizer.step()``::

        gate.balancer.update(gate.balancer.sums(routing))

    with the sums of several micro-batches added, and reduced over ranks, first.
    """

    @abstractmethod
    def sums(self, routing: Routing) -> Sums:
        """What this rank's tokens contribute, without gradient."""

    @abstractmethod
    def update(self, sums: Sums) -> None:
        """Changes the buffers, given the sums over the whole step and all ranks."""


class LossFreeBias(Balancer):
    """A bias on each expert's score that only the choice sees: raised where an expert gets too little.

    ``b_e <- b_e + rate * sign(mean load - load_e)`` after each step; the load counts what was chosen, before capacity.

    Args:
        num_experts: E.
        rate: By how much a step moves a bias, in units of the score.

    Source: Wang et al. 2024 (arXiv:2408.15664) algorithm 1; DeepSeek-V3 (arXiv:2412.19437) section 2.1.2.
    """

    bias_E: Tensor

    def __init__(self, num_experts: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("bias_E", torch.zeros(num_experts))

    def sums(self, routing: Routing) -> Sums:
        """``load_E``: assignments of each expert before capacity."""
        return {"load_E": routing.demand_per_expert().double()}

    @torch.no_grad()
    def update(self, sums: Sums) -> None:
        """One step of the rule; an expert with exactly the mean load keeps its bias."""
        load_E = sums["load_E"]
        # Counts times E instead of a mean: whole numbers, so that an even load is exactly even on every device.
        behind_E = torch.sign(load_E.sum() - len(load_E) * load_E)
        self.bias_E += self.rate * behind_E.to(self.bias_E)


class RunningTotals(Balancer):
    """Eigen's constraint: an expert whose running total is ahead of the mean by more than a margin gets no weight.

    ``G_e`` is the sum of expert e's gate weights over all samples so far. While ``G_e - mean(G) > margin`` its weight
    is 0 and the others are renormalised. The constraint holds in training for the first ``steps`` optimizer steps
    (phase 1) and is lifted afterwards to fine-tune (phase 2).

    Args:
        num_experts: E.
        margin: In units of samples: a weight of 1 on one token adds 1.
        steps: Optimizer steps of phase 1, counted by ``context.step``; None: the whole training. A layer that is called
            without a context is always at step 0: there, set ``steps`` to 0 to end phase 1.

    Source: Eigen, Ranzato and Sutskever 2013 (arXiv:1312.4314) section 3. The paper does not say whether the totals
    count weights before or after the constraint, how gradients pass it, or the margin. Here: totals count the
    constrained weights, which are what the experts were trained with; the gradient is that of the renormalised
    weights; and totals are updated once an optimizer step rather than after every sample.
    """

    totals_E: Tensor

    def __init__(self, num_experts: int, margin: float, steps: int | None = None) -> None:
        super().__init__()
        self.margin = margin
        self.steps = steps
        # float64: over a long training a float32 total stops growing.
        self.register_buffer("totals_E", torch.zeros(num_experts, dtype=torch.float64))

    def excluded(self, context: Context) -> Tensor | None:
        """(E,) bool: the experts that get no weight now; None where the constraint does not hold."""
        if not context.training or (self.steps is not None and context.step >= self.steps):
            return None
        ahead_E = self.totals_E - self.totals_E.mean() > self.margin
        # Of equal totals the mean can round to below all of them: whoever has least always stays.
        return ahead_E & (self.totals_E > self.totals_E.min())

    def sums(self, routing: Routing) -> Sums:
        """``weights_E``: summed gate weights of each expert."""
        assert routing.probs_TE is not None, "Eigen's constraint needs a dense gate"
        return {"weights_E": routing.probs_TE.detach().double().sum(0)}

    @torch.no_grad()
    def update(self, sums: Sums) -> None:
        """Adds the step's weights to the totals."""
        self.totals_E += sums["weights_E"]
