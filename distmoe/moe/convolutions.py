"""Experts of a single layer: one convolution or one linear map, and an activation.

The geometry of a convolution (kernel size, strides, padding, dilation) is :class:`Windows`. It is TensorFlow's, whose
``same`` padding is uneven where strides or even kernels ask for it.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmoe.moe.experts import Experts

Activation = Literal["relu", "gelu", "sigmoid", "tanh", "silu", "elu", "softplus"]
Padding = Literal["valid", "same", "causal"]
Size = int | Sequence[int]  # an integer stands for all axes

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "elu": F.elu,
    "softplus": F.softplus,
}
_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def activation_function(
    name: str | None, table: Mapping[str, Callable[[Tensor], Tensor]] = ACTIVATIONS
) -> Callable[[Tensor], Tensor]:
    """The function of that name in a table; None is the identity.

    Raises:
        ValueError: There is none of that name.
    """
    if name is None:
        return _identity
    if name not in table:
        raise ValueError(f"activation {name!r} is not one of {', '.join(table)}, or None")
    return table[name]


def per_axis(name: str, value: Size, rank: int) -> tuple[int, ...]:
    """One positive integer for each of ``rank`` axes.

    Raises:
        ValueError: There are not that many, or one is below 1.
    """
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(values) != rank or min(values, default=0) < 1:
        raise ValueError(f"{name} ({value}) must be a positive integer, or {rank} of them")
    return values


@dataclass(frozen=True)
class Windows:
    """Which input positions each output position of a convolution sees, one entry an axis.

    Attributes:
        kernel_size: Taps.
        strides: Input positions from one window to the next.
        padding: ``valid``: windows inside the input only. ``same``: ceil(size / stride) windows; where the padding is
            odd, the extra position is at the end. ``causal``: padded at the start only, no window sees later inputs.
        dilation: Input positions from one tap to the next.
    """

    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Padding
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, rank: int, kernel_size: Size, strides: Size, padding: Padding, dilation: Size) -> "Windows":
        """The windows over ``rank`` axes.

        Raises:
            ValueError: A setting that is out of range; causal padding in more than one dimension; strides and dilation
                both above 1, which Keras refuses as well.
        """
        windows = cls(
            per_axis("kernel_size", kernel_size, rank),
            per_axis("strides", strides, rank),
            padding,
            per_axis("dilation", dilation, rank),
        )
        if padding not in ("valid", "same", "causal"):
            raise ValueError(f"padding {padding!r} is not one of valid, same, causal")
        if padding == "causal" and rank != 1:
            raise ValueError(f"padding 'causal' is for one dimension, not {rank}: use valid or same")
        if max(windows.strides) > 1 and max(windows.dilation) > 1:
            raise ValueError(f"strides ({strides}) and dilation ({dilation}) cannot both be above 1")
        return windows

    @property
    def reach(self) -> tuple[int, ...]:
        """Input positions from the first to the last tap of a window, both counted."""
        return tuple(step * (taps - 1) + 1 for taps, step in zip(self.kernel_size, self.dilation, strict=True))

    def margins(self, size: Sequence[int]) -> list[tuple[int, int]]:
        """Zeros before and after an input of this size.

        Source: TensorFlow's documentation of padding, ``tf.nn``, "Notes on padding".
        """
        if self.padding == "valid":
            return [(0, 0)] * len(self.reach)
        if self.padding == "causal":
            return [(reach - 1, 0) for reach in self.reach]
        margins = []
        for length, reach, stride in zip(size, self.reach, self.strides, strict=True):
            total = max((math.ceil(length / stride) - 1) * stride + reach - length, 0)
            margins.append((total // 2, total - total // 2))
        return margins

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Output positions of an input of this size.

        Raises:
            ValueError: No window fits.
        """
        axes = zip(size, self.margins(size), self.reach, self.strides, strict=True)
        output = tuple((length + sum(margin) - reach) // stride + 1 for length, margin, reach, stride in axes)
        if min(output) < 1:
            raise ValueError(f"windows of {list(self.reach)} positions do not fit an input of {list(size)}")
        return output

    def at_middles(self, x: Tensor) -> Tensor:
        """(T, C, *spatial) to (T, C, *positions): the input in the middle of each window.

        Of an even window it is the earlier of the two; where it would lie in the padding (``causal``), the first input.
        """
        size = x.shape[2:]
        axes = zip(size, self.output_size(size), self.margins(size), self.reach, self.strides, strict=True)
        for axis, (length, count, (before, _), reach, stride) in enumerate(axes, start=2):
            first = (reach - 1) // 2 - before
            if (first, stride, count) != (0, 1, length):
                middles = torch.arange(count, device=x.device) * stride + first
                x = x.index_select(axis, middles.clamp(min=0))
        return x


class SingleLayerExperts(Experts):
    """``f(W_l(x) + c_l)``: stacked ``weight`` (L, ...) and ``bias`` (L, U) of one linear operation an expert.

    Args:
        expert_ids: Global ids of the local experts.
        weight_shape: Of one expert.
        units: U, channels of the output.
        activation: f; None is the identity.
        bias: Whether there are c_l, which start at zero.
        scale: s of the initial weights.

    Raises:
        ValueError: An unknown activation.
    """

    def __init__(
        self,
        expert_ids: range,
        weight_shape: tuple[int, ...],
        units: int,
        activation: Activation | None,
        bias: bool,
        scale: float,
    ) -> None:
        super().__init__(expert_ids)
        self.activation = activation_function(activation)
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(len(expert_ids), *weight_shape))
        self.bias = nn.Parameter(torch.empty(len(expert_ids), units)) if bias else None
        for index in range(len(expert_ids)):
            self.reset_expert(index)

    @abstractmethod
    def operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One expert's rows (R_l, ...) before the activation, from its weights."""

    @abstractmethod
    def draw(self, weight: Tensor) -> None:
        """Fills one expert's weight with its initial values, from torch's generator."""

    def forward(self, rows_R: Tensor, rows_per_expert_L: Tensor) -> Tensor:
        """(R, ...) to (R, U, ...)."""
        pieces = rows_R.split(rows_per_expert_L.tolist())
        weights = self.weight.unbind()
        biases = [None] * len(weights) if self.bias is None else self.bias.unbind()
        outputs = []
        for x, weight, bias in zip(pieces, weights, biases, strict=True):
            before = self.operate(x, weight, bias)
            # In place, as nothing else needs ``before``: new memory made convolutions 1.3 times slower on a CPU.
            outputs.append(before.relu_() if self.activation is torch.relu else self.activation(before))
        return torch.cat(outputs)

    @torch.no_grad()
    def reset_expert(self, index: int) -> None:
        """See :meth:`draw` and :class:`Experts`; zero biases."""
        self.draw(self.weight[index])
        if self.bias is not None:
            self.bias[index].zero_()


class ConvExperts(SingleLayerExperts):
    """``f(W_l * x + c_l)``: one convolution an expert; ``weight`` (L, F, C, *kernel), ``bias`` (L, F).

    Args:
        expert_ids: Global ids of the local experts.
        in_channels: C.
        num_filters: F.
        windows: Their geometry; its rank is the number of spatial axes, 1 to 3.
        activation: f; None is the identity.
        bias: Whether there are c_l.
        scale: s of the initial weights.
    """

    def __init__(
        self,
        expert_ids: range,
        in_channels: int,
        num_filters: int,
        windows: Windows,
        activation: Activation | None = None,
        bias: bool = True,
        scale: float = 1.0,
    ) -> None:
        shape = (num_filters, in_channels, *windows.kernel_size)
        super().__init__(expert_ids, shape, num_filters, activation, bias, scale)
        self.windows = windows

    def operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(R_l, C, *spatial) to (R_l, F, *positions)."""
        margins = self.windows.margins(x.shape[2:])
        # torch pads both ends alike; what one end has more is added by hand. F.pad counts axes from the last.
        common = [min(margin) for margin in margins]
        extra = [end - both for margin, both in zip(margins[::-1], common[::-1], strict=True) for end in margin]
        if any(extra):
            x = F.pad(x, extra)
        return _CONVOLUTIONS[len(common)](x, weight, bias, self.windows.strides, common, self.windows.dilation)

    def draw(self, weight: Tensor) -> None:
        """Normal(0, s / sqrt(C * taps))."""
        nn.init.normal_(weight, std=self.scale / math.sqrt(weight[0].numel()))


class LinearExperts(SingleLayerExperts):
    """``f(x W_l + c_l)``: one linear map an expert; ``weight`` (L, D, U), ``bias`` (L, U).

    Args:
        expert_ids: Global ids of the local experts.
        in_features: D.
        units: U.
        activation: f; None is the identity.
        bias: Whether there are c_l.
        scale: s of the initial weights.
    """

    def __init__(
        self,
        expert_ids: range,
        in_features: int,
        units: int,
        activation: Activation | None = None,
        bias: bool = True,
        scale: float = 1.0,
    ) -> None:
        super().__init__(expert_ids, (in_features, units), units, activation, bias, scale)

    def operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(R_l, D) to (R_l, U)."""
        return F.linear(x, weight.T, bias)

    def draw(self, weight: Tensor) -> None:
        """Uniform within sqrt(3 s / ((D + U) / 2)) of 0."""
        bound = math.sqrt(3.0 * self.scale / (sum(weight.shape) / 2))
        nn.init.uniform_(weight, -bound, bound)


def _identity(x: Tensor) -> Tensor:
    return x
