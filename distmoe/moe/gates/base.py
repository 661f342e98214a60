"""What every gate is: a network that gives logits, and a rule that turns them into a routing."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from distmoe.contracts import Context
from distmoe.moe.routing import Routing, at_least_float32


class Gate(nn.Module, ABC):
    """Decides which token goes to which expert.

    Two steps: :meth:`route` before the experts run and :meth:`weigh` after them. Only attentive gates, whose weights
    depend on the experts' hidden states, do something in the second.

    Args:
        network: Maps tokens (T, ...) to logits (T, E). It always runs in float32 (float64 for such tokens), outside
            autocast: in half precision, rounding flips the choice of expert.
        num_experts: E.
    """

    def __init__(self, network: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.network = network
        self.num_experts = num_experts

    def logits(self, x_T: Tensor) -> Tensor:
        """(T, E) float32 logits of tokens (T, ...)."""
        with torch.autocast(x_T.device.type, enabled=False):
            logits_TE: Tensor = self.network(at_least_float32(x_T))
        if logits_TE.shape != (len(x_T), self.num_experts):
            raise ValueError(f"the gate's network gives {tuple(logits_TE.shape)}, not ({len(x_T)}, {self.num_experts})")
        return logits_TE

    @abstractmethod
    def route(self, x_T: Tensor, context: Context) -> Routing:
        """The routing of tokens (T, ...), in which rows of a sample are neighbours (``context.rows_per_sample``)."""

    def weigh(self, routing: Routing, gathered_A: Tensor | tuple[Tensor, ...]) -> Routing:
        """The routing with its final weights, given the experts' outputs in assignment order; here unchanged."""
        del gathered_A
        return routing

    @property
    def experts_per_row(self) -> float:
        """Experts that work on one token (on average): what counts as active in parameters and FLOPs."""
        return float(self.num_experts)
