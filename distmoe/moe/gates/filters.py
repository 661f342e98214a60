"""Gates of the mixture layers: every expert works on every token, each output filter or position with its own weights.

The networks here are single linear maps; they differ in what of the token they see.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmoe.contracts import Context
from distmoe.moe.convolutions import ACTIVATIONS, Activation, Windows, activation_function
from distmoe.moe.gates.base import Gate, every_expert
from distmoe.moe.routing import Routing

GateActivation = Activation | Literal["softmax"]


def softmax_over_experts(logits_TCE: Tensor) -> Tensor:
    """(T, C, E) to the same shape, each distribution over experts summing to 1."""
    return logits_TCE.softmax(dim=-1)


GATE_ACTIVATIONS = {"softmax": softmax_over_experts, **ACTIVATIONS}


class FilterGate(Gate):
    """``g(logits)`` over the experts, separately for each of C filters or positions; all experts get all tokens.

    Args:
        network: Maps tokens to (T, C * E), the experts of one filter or position side by side.
        num_experts: E.
        activation: g: ``softmax`` over the experts, a function of each logit alone, or None for the logits themselves.
            All but softmax leave the weights unnormalised, and some of them negative.
        weight_shape: What the weights of one assignment look like beside an expert's output, C entries in all: () one
            weight a token, (F,) one a filter, (1, *positions) one a position for all filters alike.

    Raises:
        ValueError: An unknown activation.

    Source: github.com/eminorhan/mixture-of-experts (2018).
    """

    def __init__(
        self,
        network: nn.Module,
        num_experts: int,
        activation: GateActivation | None = "softmax",
        weight_shape: tuple[int, ...] = (),
    ) -> None:
        super().__init__(network, num_experts)
        self.weight_shape = weight_shape
        self.softmax = activation == "softmax"
        self.activation = activation_function(activation, GATE_ACTIVATIONS)

    @property
    def num_outputs(self) -> int:
        """C * E."""
        return math.prod(self.weight_shape) * self.num_experts

    def route(self, x_T: Tensor, context: Context) -> Routing:
        """(T, ...) tokens to T x E assignments, row by row in the order of the experts.

        Logits are always there, probabilities only with a softmax; both (T, E), or (T, C, E) where C is an axis.
        """
        logits_TCE = self.logits(x_T).unflatten(1, (-1, self.num_experts))
        weights_TCE = self.activation(logits_TCE)
        weights_A = weights_TCE.transpose(1, 2).reshape(len(x_T) * self.num_experts, *self.weight_shape)
        row_ids_A, expert_ids_A = every_expert(len(x_T), self.num_experts, x_T.device)

        def as_told(values_TCE: Tensor) -> Tensor:
            return values_TCE if self.weight_shape else values_TCE.squeeze(1)

        return Routing(
            num_rows=len(x_T),
            num_experts=self.num_experts,
            row_ids_A=row_ids_A,
            expert_ids_A=expert_ids_A,
            weights_A=weights_A,
            logits_TE=as_told(logits_TCE),
            probs_TE=as_told(weights_TCE) if self.softmax else None,
            rows_per_sample=context.rows_per_sample,
            softmax_weights=self.softmax,
            tokens_T=self.kept_tokens(x_T, context),
        )


class InnerProducts(nn.Module):
    """``<v, x> + b`` with the whole token, for each of the network's outputs.

    Args:
        width: Values that an inner product is of.
        num_outputs: Rows of ``weight`` (num_outputs, width).
        bias: Whether there are b, which start at zero.
        scale: s of the initial weights.
    """

    def __init__(self, width: int, num_outputs: int, bias: bool = True, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_outputs, width))
        self.bias = nn.Parameter(torch.empty(num_outputs)) if bias else None
        self.reset_parameters()

    def forward(self, x_T: Tensor) -> Tensor:
        """(T, ...) tokens of ``width`` values to (T, num_outputs)."""
        return F.linear(x_T.flatten(1), self.weight, self.bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See :meth:`draw`; zero biases."""
        self.draw()
        if self.bias is not None:
            self.bias.zero_()

    def draw(self) -> None:
        """Weights from Normal(0, s / sqrt(width)), by torch's generator."""
        nn.init.normal_(self.weight, std=self.scale / math.sqrt(self.weight.shape[1]))


class DenseInnerProducts(InnerProducts):
    """As :class:`InnerProducts`, with the initial weights of the source's dense layer."""

    def draw(self) -> None:
        """Weights uniform within sqrt(3 s / ((width + 1) / 2)) of 0: an expert's gate is a layer with one output."""
        bound = math.sqrt(3.0 * self.scale / ((self.weight.shape[1] + 1) / 2))
        nn.init.uniform_(self.weight, -bound, bound)


class PooledInnerProducts(InnerProducts):
    """As :class:`InnerProducts`, with each channel's mean over the image; ``width`` is the number of channels."""

    def forward(self, x_T: Tensor) -> Tensor:
        """(T, C, *spatial) to (T, num_outputs)."""
        return super().forward(x_T.flatten(2).mean(2))


class PositionInnerProducts(InnerProducts):
    """As :class:`InnerProducts`, with the channels in the middle of each window: a 1x1 convolution.

    Args:
        windows: Of the experts' convolution.
        channels: C.
        num_experts: E.
        bias: See :class:`InnerProducts`.
        scale: See :class:`InnerProducts`.
    """

    def __init__(
        self, windows: Windows, channels: int, num_experts: int, bias: bool = True, scale: float = 1.0
    ) -> None:
        super().__init__(channels, num_experts, bias, scale)
        self.windows = windows

    def forward(self, x_T: Tensor) -> Tensor:
        """(T, C, *spatial) to (T, P * E) for P positions, the experts of one position side by side."""
        middles = self.windows.at_middles(x_T).flatten(2)
        # A convolution takes half the time of a matrix product with the channels moved to the end.
        return F.conv1d(middles, self.weight.unsqueeze(-1), self.bias).transpose(1, 2).flatten(1)
