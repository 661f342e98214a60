"""What every gate is: a network that gives logits, and a rule that turns them into a routing."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from distmoe.contracts import Context
from distmoe.moe.balance import Balancer
from distmoe.moe.routing import Routing, at_least_float32
from distmoe.moe.sums import Reducer, no_reduction


class Gate(nn.Module, ABC):
    """Decides which token goes to which expert.

    Two steps: :meth:`route` before the experts run and :meth:`weigh` after them. Only attentive gates, whose weights
    depend on the experts' hidden states, do something in the second.

    Args:
        network: Maps tokens (T, ...) to (T, :attr:`num_outputs`), mostly logits. It always runs in float32 (float64 for
            such tokens), outside autocast: in half precision, rounding flips the choice of expert. For the same reason
            the gate's weights and buffers stay float32 where a model around it becomes half precision. None for gates
            that learn nothing.
        num_experts: E.

    Attributes:
        balancer: State that keeps the load even and is updated once an optimizer step, or None.
        needs_hidden: Whether weights come from :meth:`weigh`, which needs the experts' hidden states.
        noisy: Whether the gate draws random numbers in training.
        reducer: Over the ranks whose tokens make up a micro-batch, where the gate's routing group is ``batch``. Every
            rank then calls :meth:`route` equally often. By default all tokens are here.
    """

    balancer: Balancer | None
    reducer: Reducer
    needs_hidden = False
    noisy = False

    def __init__(self, network: nn.Module | None, num_experts: int) -> None:
        super().__init__()
        self.network = network
        self.num_experts = num_experts
        self.balancer = None
        self.reducer = no_reduction

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What ``to``, ``half`` and the like are made of: floating point stays float32 or wider, unrounded."""

        def wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not moved.is_floating_point() or moved.element_size() >= torch.float32.itemsize:
                return moved
            return tensor.to(moved.device, torch.float32)  # from the tensor itself: fn has rounded its values

        super()._apply(wide, recurse)  # type: ignore[no-untyped-call]
        return self

    def logits(self, x_T: Tensor) -> Tensor:
        """(T, :attr:`num_outputs`) outputs of the network for tokens (T, ...), float32 or wider.

        Raises:
            ValueError: The network gives another shape.
        """
        assert self.network is not None, "this gate has no network"
        with torch.autocast(x_T.device.type, enabled=False):
            logits: Tensor = self.network(at_least_float32(x_T))
        if logits.shape != (len(x_T), self.num_outputs):
            raise ValueError(f"the gate's network gives {tuple(logits.shape)}, not ({len(x_T)}, {self.num_outputs})")
        return logits

    @property
    def num_outputs(self) -> int:
        """Columns that the network must give: E, unless the gate says otherwise."""
        return self.num_experts

    @abstractmethod
    def route(self, x_T: Tensor, context: Context) -> Routing:
        """The routing of tokens (T, ...), in which rows of a sample are neighbours (``context.rows_per_sample``).

        Collective if the gate has a :attr:`reducer` over several ranks and the routing group ``batch``.
        """

    def weigh(self, routing: Routing, hidden_A: Tensor) -> Routing:
        """The routing with its final weights, from the experts' hidden states (A, hidden) in assignment order.

        Here it is unchanged; see :attr:`needs_hidden`.
        """
        del hidden_A
        return routing

    @staticmethod
    def kept_tokens(x_T: Tensor, context: Context) -> Tensor | None:
        """What a routing keeps of the tokens: in evaluation nothing, or every layer's input would stay in memory."""
        return x_T.detach() if context.training else None

    @property
    def experts_per_row(self) -> float:
        """Experts that work on one token, on average: their parameters count as active."""
        return float(self.num_experts)


def token_counters(context: Context, device: torch.device) -> tuple[Tensor, Tensor]:
    """(T,) sample id and (T,) position within its sample of each token, on ``device``: the counters of its noise."""
    rows = context.rows_per_sample
    samples_B = context.sample_ids.to(device)
    return samples_B.repeat_interleave(rows), torch.arange(rows, device=device).repeat(len(samples_B))


def every_expert(num_rows: int, num_experts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(A,) row and (A,) expert ids of the T x E assignments of a dense gate, row by row."""
    rows = torch.arange(num_rows, device=device).repeat_interleave(num_experts)
    return rows, torch.arange(num_experts, device=device).repeat(num_rows)
