"""The Keras mixture layers in NumPy, from their formulas, by loops over images, positions and taps: an oracle.

Everything is as Keras has it: channels last, ``expert_kernel`` with filters and experts in one axis (the experts of one
filter side by side), ``gate_kernel`` of the input's shape and (filters, experts), padding by TensorFlow's rule.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def activate(name: str | None, values: Array) -> Array:
    """Softmax is over the last axis; everything else is of each value."""
    match name:
        case None:
            return values
        case "relu":
            return np.maximum(values, 0.0)
        case "sigmoid":
            return 1.0 / (1.0 + np.exp(-values))
        case "tanh":
            return np.tanh(values)
        case "gelu":
            return values * 0.5 * (1.0 + np.vectorize(math.erf, otypes=[float])(values / math.sqrt(2.0)))
        case "silu":
            return values / (1.0 + np.exp(-values))
        case "elu":
            return np.where(values > 0.0, values, np.exp(values) - 1.0)
        case "softplus":
            return np.log(1.0 + np.exp(values))
        case "softmax":
            odds = np.exp(values)
            return odds / odds.sum(axis=-1, keepdims=True)
    raise ValueError(name)


def dense_moe(
    x: Array,
    expert_kernel: Array,
    expert_bias: Array | None,
    gate_kernel: Array,
    gate_bias: Array | None,
    expert_activation: str | None,
    gate_activation: str | None,
) -> Array:
    """(..., D) by kernels (D, U, K), (U, K), (D, K), (K,) to (..., U): one vector at a time."""
    _, units, num_experts = expert_kernel.shape
    y = np.zeros((*x.shape[:-1], units))
    for where in np.ndindex(x.shape[:-1]):
        logits = np.array([x[where] @ gate_kernel[:, k] for k in range(num_experts)])
        gate = activate(gate_activation, logits if gate_bias is None else logits + gate_bias)
        for k in range(num_experts):
            before = x[where] @ expert_kernel[:, :, k]
            if expert_bias is not None:
                before = before + expert_bias[:, k]
            y[where] += gate[k] * activate(expert_activation, before)
    return y


def zeros_around(size: int, taps: int, stride: int, dilation: int, padding: str) -> tuple[int, int]:
    """Zeros before and after one axis: TensorFlow's rule."""
    reach = (taps - 1) * dilation + 1
    match padding:
        case "valid":
            return 0, 0
        case "causal":
            return reach - 1, 0
        case "same":
            windows = -(-size // stride)
            zeros = max(0, (windows - 1) * stride + reach - size)
            return zeros // 2, zeros - zeros // 2
    raise ValueError(padding)


def convolve(x: Array, kernel: Array, strides: Sequence[int], padding: str, dilation: Sequence[int]) -> Array:
    """(B, *spatial, C) by (*taps, C, F) to (B, *positions, F): one position and tap at a time."""
    taps, spatial = kernel.shape[:-2], x.shape[1:-1]
    around = [zeros_around(*axis, padding) for axis in zip(spatial, taps, strides, dilation, strict=True)]
    reach = [(count - 1) * step + 1 for count, step in zip(taps, dilation, strict=True)]
    positions = [
        (size + before + after - length) // stride + 1
        for size, (before, after), length, stride in zip(spatial, around, reach, strides, strict=True)
    ]
    y = np.zeros((len(x), *positions, kernel.shape[-1]))
    for position in np.ndindex(*positions):
        for tap in np.ndindex(*taps):
            seen = [
                p * stride + t * step - before
                for p, stride, t, step, (before, _) in zip(position, strides, tap, dilation, around, strict=True)
            ]
            if all(0 <= at < size for at, size in zip(seen, spatial, strict=True)):
                y[(slice(None), *position)] += x[(slice(None), *seen)] @ kernel[tap]
    return y


def full_gate(x: Array, gate_kernel: Array, gate_bias: Array | None, activation: str | None) -> Array:
    """(B, *spatial, C) by (*spatial, C, F, K) to the weights (B, F, K): an inner product with each whole image."""
    weights = np.zeros((len(x), *gate_kernel.shape[-2:]))
    for image, filter_, expert in np.ndindex(*weights.shape):
        logit = (x[image] * gate_kernel[..., filter_, expert]).sum()
        weights[image, filter_, expert] = logit if gate_bias is None else logit + gate_bias[filter_, expert]
    return activate(activation, weights)


def conv_moe(
    x: Array,
    expert_kernel: Array,
    expert_bias: Array | None,
    weights: Array,
    strides: Sequence[int],
    padding: str,
    dilation: Sequence[int],
    expert_activation: str | None,
) -> Array:
    """(B, *spatial, C) by (*taps, C, F * K) and (F, K) to (B, *positions, F).

    The weights are (B, F, K), or (B, *positions, F, K) for a gate that sees positions.
    """
    num_filters, num_experts = weights.shape[-2:]
    outputs = convolve(x, expert_kernel, strides, padding, dilation)
    y = np.zeros((*outputs.shape[:-1], num_filters))
    for image, filter_, expert in np.ndindex(len(x), num_filters, num_experts):
        before = outputs[image, ..., filter_ * num_experts + expert]
        if expert_bias is not None:
            before = before + expert_bias[filter_, expert]
        y[image, ..., filter_] += weights[image, ..., filter_, expert] * activate(expert_activation, before)
    return y
