"""Mixture layers in which every expert works on every input: dense, and convolutional with weights for each filter.

They are :class:`distmoe.moe.layer.MoELayer` with a dense gate, so their experts can be spread over ranks.

Source of all: github.com/eminorhan/mixture-of-experts (2018), layers for Keras.
"""

import math
from typing import ClassVar, Literal, Self, get_args

from torch import Tensor

from distmoe.contracts import Context
from distmoe.moe.convolutions import Activation, ConvExperts, LinearExperts, Padding, Size, Windows, per_axis
from distmoe.moe.dispatch import Placement
from distmoe.moe.experts import Experts
from distmoe.moe.gates.base import Gate
from distmoe.moe.gates.dense import UniformGate
from distmoe.moe.gates.filters import (
    DenseInnerProducts,
    FilterGate,
    GateActivation,
    InnerProducts,
    PooledInnerProducts,
    PositionInnerProducts,
)
from distmoe.moe.layer import MoELayer
from distmoe.moe.routing import Routing

DenseGateKind = Literal["full", "uniform"]
ConvGateKind = Literal["full", "pooled", "position", "uniform"]


class MixtureLayer(MoELayer):
    """What the layers here have in common.

    Args:
        gate: A dense gate.
        experts: The experts on this rank.
        placement: Where the experts live.
        token_shape: What one token looks like; None stands for an axis of any size.
    """

    def __init__(self, gate: Gate, experts: Experts, placement: Placement, token_shape: tuple[int | None, ...]) -> None:
        super().__init__(gate, experts, placement, token_dims=len(token_shape))
        self.token_shape = token_shape

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Routing]:
        """(B, ..., token) to the output, its leading axes and dtype as the input's, and the routing.

        Args:
            x: Tokens; the first axis is the sample.
            context: See :class:`distmoe.moe.layer.MoELayer`; nothing here is random.

        Raises:
            ValueError: An input of another shape.
        """
        sizes = x.shape[-len(self.token_shape) :]
        if x.dim() <= len(sizes) or any(
            wanted not in (None, size) for wanted, size in zip(self.token_shape, sizes, strict=True)
        ):
            token = ", ".join("any" if wanted is None else str(wanted) for wanted in self.token_shape)
            raise ValueError(f"this layer takes inputs of shape (B, ..., {token}), not {tuple(x.shape)}")
        return super().forward(x, context)

    def freeze_gate(self) -> Self:
        """Leaves the gate as it is: its parameters get no gradient. Inputs do, through the gate as well."""
        self.gate.requires_grad_(False)
        return self


class DenseMoE(MixtureLayer):
    """``y = sum_k g(v_k . x + b_k) f(W_k x + c_k)`` on the last axis of inputs (B, ..., D).

    Args:
        in_features: D.
        units: U.
        num_experts: K.
        expert_activation: f; None is the identity.
        gate_activation: g: ``softmax`` over the experts, a function of each value alone, or None, the identity.
        gate: ``full``, as above, or ``uniform``: every weight is 1/K, and the gate's other settings mean nothing.
        expert_bias: Whether there are c_k.
        gate_bias: Whether there are b_k.
        expert_scale: s of the experts' initial weights, uniform within sqrt(3 s / ((D + U) / 2)) of 0; biases are 0.
        gate_scale: s of the gate's, uniform within sqrt(3 s / ((D + 1) / 2)) of 0.
        placement: Where the experts live; None: all of them here.

    Raises:
        ValueError: An unknown name, a number below 1; in the forward pass, an input of another width.

    Example:
        >>> layer = DenseMoE(64, 128, num_experts=4, expert_activation="relu", gate_activation="softmax")
        >>> y, routing = layer(torch.randn(8, 10, 64))  # y is (8, 10, 128)

    Source: see the module. Differs: right for inputs of more than two axes; no regularisers or constraints.
    """

    def __init__(
        self,
        in_features: int,
        units: int,
        num_experts: int,
        *,
        expert_activation: Activation | None = None,
        gate_activation: GateActivation | None = None,
        gate: DenseGateKind = "full",
        expert_bias: bool = True,
        gate_bias: bool = True,
        expert_scale: float = 1.0,
        gate_scale: float = 1.0,
        placement: Placement | None = None,
    ) -> None:
        _check(gate, get_args(DenseGateKind), in_features=in_features, units=units, num_experts=num_experts)
        placement = placement or Placement()
        local = placement.local_experts(num_experts)
        chosen: Gate = UniformGate(num_experts)
        if gate == "full":
            network = DenseInnerProducts(in_features, num_experts, gate_bias, gate_scale)
            chosen = FilterGate(network, num_experts, gate_activation)
        experts = LinearExperts(local, in_features, units, expert_activation, expert_bias, expert_scale)
        super().__init__(chosen, experts, placement, (in_features,))


class ConvMoE(MixtureLayer):
    """``y_f = sum_k g(<V_fk, x> + b_fk) f(W_fk * x + c_fk)``: K convolutions, each filter with weights of its own.

    The source's gate is ``full``: each weight comes from an inner product with the whole input, and a softmax acts over
    the K experts of one filter. Use :class:`Conv1dMoE`, :class:`Conv2dMoE` or :class:`Conv3dMoE`, which have ``rank``
    spatial axes: inputs (B, ..., C, *spatial) to outputs (B, ..., F, *positions).

    Args:
        in_channels: C.
        num_filters: F.
        num_experts: K.
        kernel_size: One for all axes or one an axis, as ``input_size``, ``strides`` and ``dilation``.
        input_size: Of the spatial axes; the gates ``full`` and ``position`` are made for one size.
        strides: See :class:`distmoe.moe.convolutions.Windows`.
        padding: ``valid``, ``same``, or ``causal`` in one dimension.
        dilation: See :class:`distmoe.moe.convolutions.Windows`.
        expert_activation: f; None is the identity.
        gate_activation: g: ``softmax`` over the experts, a function of each value alone, or None, the identity.
        gate: ``full``, as above: C * prod(input_size) parameters a filter and expert. ``pooled``: an inner product with
            each channel's mean, C parameters a filter and expert. ``position``: a 1x1 convolution of the input in the
            middle of each window, alike for all filters, C parameters an expert. ``uniform``: 1/K, no parameters, and
            the gate's other settings mean nothing.
        expert_bias: Whether there are c_fk.
        gate_bias: Whether there are b_fk.
        expert_scale: s of the experts' initial weights, Normal(0, s / sqrt(C * prod(kernel_size))); biases are 0.
        gate_scale: s of the gate's, Normal(0, s / sqrt(n)) where the inner product is of n values.
        placement: Where the experts live; None: all of them here.

    Raises:
        ValueError: An unknown name, a number below 1, no window that fits, no ``input_size`` where the gate needs it,
            strides and dilation both above 1; in the forward pass, an input of another shape.

    Source: see the module; ``position``: the recipe "Mixture of experts" of keras.io (2025). Differs: channels come
    before the spatial axes; other gates beside ``full``; no regularisers or constraints.
    """

    rank: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        num_filters: int,
        num_experts: int,
        kernel_size: Size,
        input_size: Size | None = None,
        *,
        strides: Size = 1,
        padding: Padding = "valid",
        dilation: Size = 1,
        expert_activation: Activation | None = None,
        gate_activation: GateActivation | None = None,
        gate: ConvGateKind = "full",
        expert_bias: bool = True,
        gate_bias: bool = True,
        expert_scale: float = 1.0,
        gate_scale: float = 1.0,
        placement: Placement | None = None,
    ) -> None:
        _check(gate, get_args(ConvGateKind), in_channels=in_channels, num_filters=num_filters, num_experts=num_experts)
        placement = placement or Placement()
        windows = Windows.of(self.rank, kernel_size, strides, padding, dilation)
        size = None if input_size is None else per_axis("input_size", input_size, self.rank)
        positions = None if size is None else windows.output_size(size)
        chosen: Gate = UniformGate(num_experts)
        if gate != "uniform":
            network: InnerProducts
            weight_shape: tuple[int, ...] = (num_filters,)
            if gate == "pooled":
                network = PooledInnerProducts(in_channels, num_filters * num_experts, gate_bias, gate_scale)
            elif size is None or positions is None:
                raise ValueError(f"the gate {gate} needs an input_size")
            elif gate == "position":
                weight_shape = (1, *positions)
                network = PositionInnerProducts(windows, in_channels, num_experts, gate_bias, gate_scale)
            else:
                width = in_channels * math.prod(size)
                network = InnerProducts(width, num_filters * num_experts, gate_bias, gate_scale)
            chosen = FilterGate(network, num_experts, gate_activation, weight_shape)
        local = placement.local_experts(num_experts)
        experts = ConvExperts(local, in_channels, num_filters, windows, expert_activation, expert_bias, expert_scale)
        super().__init__(chosen, experts, placement, (in_channels, *(size or (None,) * self.rank)))


class Conv1dMoE(ConvMoE):
    """:class:`ConvMoE` over inputs (B, C, length)."""

    rank = 1


class Conv2dMoE(ConvMoE):
    """:class:`ConvMoE` over inputs (B, C, height, width).

    Example:
        >>> layer = Conv2dMoE(3, 32, 2, kernel_size=3, input_size=32, padding="same", gate_activation="softmax")
        >>> y, routing = layer(torch.randn(8, 3, 32, 32))  # y is (8, 32, 32, 32)
    """

    rank = 2


class Conv3dMoE(ConvMoE):
    """:class:`ConvMoE` over inputs (B, C, depth, height, width)."""

    rank = 3


def _check(gate: str, kinds: tuple[str, ...], **numbers: int) -> None:
    if gate not in kinds:
        raise ValueError(f"gate {gate!r} is not one of {', '.join(kinds)}")
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} ({number}) must be at least 1")
