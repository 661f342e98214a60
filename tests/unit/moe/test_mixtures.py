import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distmoe.moe.convolutions import ACTIVATIONS
from distmoe.moe.gates.filters import GATE_ACTIVATIONS
from distmoe.moe.mixtures import Conv1dMoE, Conv2dMoE, Conv3dMoE, DenseMoE, MixtureLayer
from tests import keras_layers as keras
from tests.unit.moe.little_mixtures import (
    CONVOLUTIONS,
    EXACT,
    LAYERS,
    conv,
    dense,
    filled,
    layer_and_input,
)


def as_array(values: torch.Tensor | None) -> np.ndarray | None:
    return None if values is None else values.detach().numpy()


def last(x: torch.Tensor | np.ndarray):
    """Channels moved from the second to the last axis."""
    return np.moveaxis(as_array(x) if isinstance(x, torch.Tensor) else x, 1, -1)


# The formulas, by hand.


def test_dense_by_hand():
    layer = DenseMoE(1, 1, 2).double()
    with torch.no_grad():
        layer.experts.weight.copy_(torch.tensor([[[1.0]], [[3.0]]]))
        layer.experts.bias.copy_(torch.tensor([[0.0], [1.0]]))
        layer.gate.network.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        layer.gate.network.bias.copy_(torch.tensor([0.0, 0.5]))
    y, routing = layer(torch.tensor([[2.0]], dtype=torch.float64))
    # Linear gate: 2 and -1.5; experts: 2 and 7; 4 - 10.5.
    assert y.tolist() == [[-6.5]]
    assert routing.weights_A.tolist() == [2.0, -1.5]


def test_convolution_by_hand():
    layer = Conv1dMoE(1, 2, 2, 2, 3).double()
    with torch.no_grad():
        layer.experts.weight.copy_(torch.tensor([[[[1.0, 0.0]], [[1.0, 1.0]]], [[[0.0, 1.0]], [[1.0, -1.0]]]]))
        # Of filter 0 for expert 0 and 1, of filter 1 for expert 0 and 1.
        layer.gate.network.weight.copy_(
            torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        )
    y, routing = layer(torch.tensor([[[1.0, 2.0, 3.0]]], dtype=torch.float64))
    # Filter 0: 1 * [1, 2] - 3 * [2, 3]. Filter 1: 2 * [3, 5] + 3 * [-1, -1].
    assert y.tolist() == [[[-5.0, -7.0], [3.0, 7.0]]]
    assert routing.weights_A.tolist() == [[1.0, 2.0], [-3.0, 3.0]]


# The Keras layers.


@given(
    leading=st.sampled_from([(3,), (1,), (2, 3), (2, 1, 3)]),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    expert_activation=st.sampled_from([None, *ACTIVATIONS]),
    gate_activation=st.sampled_from([None, *GATE_ACTIVATIONS]),
    biases=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_dense_equals_keras(leading, sizes, expert_activation, gate_activation, biases, seed):
    width, units, num_experts = sizes
    activations = {"expert_activation": expert_activation, "gate_activation": gate_activation}
    layer = DenseMoE(width, units, num_experts, expert_bias=biases[0], gate_bias=biases[1], **activations)
    layer = filled(layer, seed)
    x = torch.randn(*leading, width, dtype=torch.float64)
    expert_bias, network = as_array(layer.experts.bias), layer.gate.network
    expected = keras.dense_moe(
        as_array(x),
        np.moveaxis(as_array(layer.experts.weight), 0, -1),
        None if expert_bias is None else expert_bias.T,
        as_array(network.weight).T,
        as_array(network.bias),
        expert_activation,
        gate_activation,
    )
    np.testing.assert_allclose(as_array(layer(x)[0]), expected, **EXACT)


@st.composite
def convolutions(draw):
    """Arguments of a convolution over up to three axes, its input size, and its kernel, strides and dilation."""
    rank = draw(st.integers(1, 3))

    def axes(low: int, high: int) -> st.SearchStrategy:
        return st.tuples(*[st.integers(low, high)] * rank)

    padding = draw(st.sampled_from(["valid", "same", "causal"] if rank == 1 else ["valid", "same"]))
    kernel, strides, dilation = draw(axes(1, 3)), (1,) * rank, (1,) * rank
    if draw(st.booleans()):
        strides = draw(axes(1, 3))
    else:
        dilation = draw(axes(1, 2))
    reach = [(taps - 1) * step + 1 for taps, step in zip(kernel, dilation, strict=True)]
    extra = draw(axes(0, 3))
    size = tuple((length if padding == "valid" else 1) + more for length, more in zip(reach, extra, strict=True))
    return {"kernel_size": kernel, "input_size": size, "strides": strides, "padding": padding, "dilation": dilation}


def keras_experts(layer: MixtureLayer) -> tuple[np.ndarray, np.ndarray | None]:
    """The experts' weights as Keras has them: (*taps, C, F * K), and (F, K)."""
    weight, bias = as_array(layer.experts.weight), as_array(layer.experts.bias)
    kernel = np.moveaxis(weight, (2, 1, 0), (-3, -2, -1))
    return kernel.reshape(*kernel.shape[:-2], -1), None if bias is None else bias.T


@given(
    geometry=convolutions(),
    counts=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    rows=st.integers(0, 2),
    expert_activation=st.sampled_from([None, *ACTIVATIONS]),
    gate_activation=st.sampled_from([None, *GATE_ACTIVATIONS]),
    biases=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=100, derandomize=True)
def test_convolutions_equal_keras(geometry, counts, rows, expert_activation, gate_activation, biases, seed):
    channels, num_filters, num_experts = counts
    rank, size = len(geometry["input_size"]), geometry["input_size"]
    activations = {"expert_activation": expert_activation, "gate_activation": gate_activation}
    arguments = {**geometry, **activations, "expert_bias": biases[0], "gate_bias": biases[1]}
    layer = filled(CONVOLUTIONS[rank](channels, num_filters, num_experts, **arguments), seed)
    x = torch.randn(rows, channels, *size, dtype=torch.float64)
    network = layer.gate.network
    gate_kernel = as_array(network.weight).reshape(num_filters, num_experts, channels, *size)
    gate_kernel = np.moveaxis(gate_kernel, (2, 0, 1), (-3, -2, -1))
    gate_bias = None if network.bias is None else as_array(network.bias).reshape(num_filters, num_experts)
    weights = keras.full_gate(last(x), gate_kernel, gate_bias, gate_activation)
    how = geometry["strides"], geometry["padding"], geometry["dilation"]
    expected = keras.conv_moe(last(x), *keras_experts(layer), weights, *how, expert_activation)
    np.testing.assert_allclose(last(layer(x)[0]), expected, **EXACT)


# The other gates.


def has_a_middle_tap(geometry) -> bool:
    """Not for causal padding, whose first windows have it in the padding, nor between two taps that lie apart."""
    axes = zip(geometry["kernel_size"], geometry["dilation"], strict=True)
    return geometry["padding"] != "causal" and (2, 2) not in axes


@given(
    geometry=convolutions().filter(has_a_middle_tap),
    gate_activation=st.sampled_from([None, "softmax"]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40, derandomize=True)
def test_a_position_gate_is_a_convolution_with_the_middle_tap_of_each_window(geometry, gate_activation, seed):
    kernel, size = geometry["kernel_size"], geometry["input_size"]
    layer = CONVOLUTIONS[len(kernel)](2, 3, 2, **geometry, gate="position", gate_activation=gate_activation)
    layer, network = filled(layer, seed), layer.gate.network
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    middle_only = np.zeros((*kernel, 2, 2))
    middle_only[tuple((taps - 1) // 2 for taps in kernel)] = as_array(network.weight).T
    how = geometry["strides"], geometry["padding"], geometry["dilation"]
    logits = keras.convolve(last(x), middle_only, *how) + as_array(network.bias)
    weights = keras.activate(gate_activation, logits)
    for_each_filter = np.stack([weights] * 3, axis=-2)
    expected = keras.conv_moe(last(x), *keras_experts(layer), for_each_filter, *how, None)
    y, routing = layer(x)
    np.testing.assert_allclose(last(y), expected, **EXACT)
    np.testing.assert_allclose(as_array(routing.logits_TE), logits.reshape(2, -1, 2), **EXACT)


def test_a_causal_position_gate_sees_no_later_input():
    layer = conv(1, "position", padding="causal", size=6)
    x = torch.randn(1, 2, 6, dtype=torch.float64)
    changed = x.clone()
    changed[..., 3:] += 1.0
    (y, routing), (y_changed, routing_changed) = layer(x), layer(changed)
    assert torch.equal(y[..., :3], y_changed[..., :3])
    assert not torch.isclose(y[..., 3:], y_changed[..., 3:]).any()
    # Windows of three end at each position: the middle is one before, and the first input where there is none.
    expected = layer.gate.network.weight @ x[0][:, [0, 0, 1, 2, 3, 4]] + layer.gate.network.bias[:, None]
    torch.testing.assert_close(routing.logits_TE[0], expected.T, **EXACT)
    assert torch.equal(routing.probs_TE[0, :4], routing_changed.probs_TE[0, :4])


@pytest.mark.parametrize("rank", CONVOLUTIONS)
def test_a_pooled_gate_sees_the_mean_of_each_channel(rank):
    layer, x = layer_and_input(f"{rank}d, pooled")
    network = layer.gate.network
    means = as_array(x).mean(axis=tuple(range(2, x.dim())))
    logits = (means @ as_array(network.weight).T + as_array(network.bias)).reshape(3, 4, 3)
    weights = keras.activate("softmax", logits)
    ones = (1,) * rank
    expected = keras.conv_moe(last(x), *keras_experts(layer), weights, ones, "same", ones, "tanh")
    y, routing = layer(x)
    np.testing.assert_allclose(last(y), expected, **EXACT)
    np.testing.assert_allclose(as_array(routing.logits_TE), logits, **EXACT)


def test_a_pooled_or_uniform_layer_without_a_size_takes_images_of_any():
    for gate in ("pooled", "uniform"):
        layer = conv(2, gate, size=None)
        small, large = torch.randn(2, 2, 4, 5, dtype=torch.float64), torch.randn(2, 2, 7, 6, dtype=torch.float64)
        assert [layer(x)[0].shape for x in (small, large)] == [(2, 4, 4, 5), (2, 4, 7, 6)]


@pytest.mark.parametrize("name", [name for name in LAYERS if "uniform" in name])
def test_a_uniform_gate_averages_the_experts_and_has_no_parameters(name):
    layer, x = layer_and_input(name)
    outputs = layer.experts(torch.cat([x] * 3), torch.tensor([3, 3, 3])).unflatten(0, (3, 3))
    torch.testing.assert_close(layer(x)[0], outputs.mean(0), **EXACT)
    assert list(layer.gate.parameters()) == []


@pytest.mark.parametrize("name", [name for name in LAYERS if "uniform" not in name])
def test_a_frozen_gate_gets_no_gradient_but_lets_one_through(name):
    layer, x = layer_and_input(name)
    assert layer.freeze_gate() is layer
    frozen, free = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(frozen)[0].square().sum().backward()
    assert {parameter.grad for parameter in layer.gate.parameters()} == {None}
    assert min(float(parameter.grad.abs().sum()) for parameter in layer.experts.parameters()) > 0.0
    layer.gate.requires_grad_(True)
    layer(free)[0].square().sum().backward()
    assert torch.equal(frozen.grad, free.grad)
    assert min(float(parameter.grad.abs().sum()) for parameter in layer.gate.parameters()) > 0.0


# Sizes and initial values of the source.


def demo_layers(num_experts: int, gate: str) -> list[nn.Module]:
    """The layers of the source's CIFAR-10 demo: four 3x3 convolutions, a pool after every second, two dense layers."""
    same, valid = {"padding": "same", "gate": gate}, {"padding": "valid", "gate": gate}
    return [
        Conv2dMoE(3, 32, num_experts, 3, 32, **same),
        Conv2dMoE(32, 32, num_experts, 3, 32, **valid),
        Conv2dMoE(32, 64, num_experts, 3, 15, **same),
        Conv2dMoE(64, 64, num_experts, 3, 15, **valid),
        DenseMoE(64 * 6 * 6, 512, num_experts, gate=gate),
        nn.Linear(512, 10),
    ]


def num_parameters(layers: list[nn.Module]) -> int:
    return sum(parameter.numel() for layer in layers for parameter in layer.parameters())


def test_the_sources_demo_has_its_published_number_of_parameters():
    assert num_parameters(demo_layers(1, "uniform")) == 1_250_858  # one expert and no gate: the plain CNN
    layers = demo_layers(2, "full")
    assert num_parameters(layers) == 7_560_140
    assert round(num_parameters([layer.gate for layer in layers[:-1]]) / 1e6, 2) == 5.06
    x = torch.zeros(1, 3, 32, 32)
    for number, layer in enumerate(layers[:4]):
        x = layer(x)[0]
        if number % 2:
            x = nn.functional.max_pool2d(x, 2)
    assert layers[5](layers[4](x.flatten(1))[0]).shape == (1, 10)


def test_cheap_gates_have_few_parameters():
    # (C + 1) values for each filter and expert, or for each expert.
    assert num_parameters([conv(2, "pooled").gate]) == (2 + 1) * 4 * 3
    assert num_parameters([conv(2, "position").gate]) == (2 + 1) * 3


@pytest.mark.parametrize(("gate", "values"), [("full", 4 * 20 * 30), ("pooled", 4), ("position", 4)])
def test_gates_of_convolutions_start_normal_with_variance_scale_squared_over_the_values_seen(gate, values):
    torch.manual_seed(0)
    num_filters = {"full": 4, "pooled": 1000, "position": 1}[gate]
    num_experts = {"full": 2, "pooled": 2, "position": 2000}[gate]
    network = Conv2dMoE(4, num_filters, num_experts, 3, (20, 30), gate=gate, gate_scale=3.0).gate.network
    # At least 8000 values: the standard deviation is known to 0.8 %.
    assert float(network.weight.detach().std()) == pytest.approx(3.0 / math.sqrt(values), rel=0.04)
    assert float(network.bias.detach().abs().sum()) == 0.0


def test_the_gate_of_a_dense_layer_starts_uniform_within_its_bound():
    torch.manual_seed(0)
    network = DenseMoE(99, 7, 100, gate_scale=2.0).gate.network
    weight, bound = network.weight.detach(), math.sqrt(3 * 2.0 / 50)  # (99 + 1) / 2
    assert 0.995 * bound < float(weight.abs().max()) <= bound  # 9900 values: a smaller maximum has odds of e^-49
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert float(network.bias.detach().abs().sum()) == 0.0


def test_scales_and_biases_reach_the_experts():
    torch.manual_seed(0)
    dense_layer = DenseMoE(100, 100, 2, expert_scale=4.0, expert_bias=False, gate_bias=False)
    conv_layer = Conv1dMoE(10, 100, 2, 10, 12, expert_scale=4.0, expert_bias=False, gate_bias=False)
    assert float(dense_layer.experts.weight.detach().std()) == pytest.approx(math.sqrt(4.0 / 100), rel=0.05)
    assert float(conv_layer.experts.weight.detach().std()) == pytest.approx(4.0 / math.sqrt(100), rel=0.05)
    for layer in (dense_layer, conv_layer):
        assert [name for name, _ in layer.named_parameters()] == ["gate.network.weight", "experts.weight"]


# What is refused.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DenseMoE(2, 3, 0), r"num_experts \(0\) must be at least 1"),
        (lambda: DenseMoE(2, 3, 2, gate="pooled"), "gate 'pooled' is not one of full, uniform"),
        (
            lambda: DenseMoE(2, 3, 2, gate_activation="hard"),
            "activation 'hard' is not one of softmax, relu, .* or None",
        ),
        (
            lambda: Conv2dMoE(2, 3, 2, 3, 5, gate="global"),
            "gate 'global' is not one of full, pooled, position, uniform",
        ),
        (lambda: Conv2dMoE(2, 3, 2, 3), "the gate full needs an input_size"),
        (lambda: Conv2dMoE(2, 3, 2, 3, gate="position"), "the gate position needs an input_size"),
        (
            lambda: Conv2dMoE(2, 3, 2, 3, (5, 5, 5)),
            r"input_size \(\(5, 5, 5\)\) must be a positive integer, or 2 of them",
        ),
        (lambda: Conv2dMoE(2, 3, 2, 3, (5, 2), gate="uniform"), r"windows of \[3, 3\] positions do not fit .*\[5, 2\]"),
        (lambda: Conv3dMoE(2, 3, 2, 3, 9, strides=2, dilation=2), "cannot both be above 1"),
        (lambda: Conv2dMoE(2, 3, 2, 3, 5, padding="causal"), "'causal' is for one dimension, not 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (dense(), (2, 3), r"inputs of shape \(B, ..., 4\), not \(2, 3\)"),
        (dense(), (4,), r"inputs of shape \(B, ..., 4\), not \(4,\)"),
        (conv(), (2, 2, 5, 6), r"inputs of shape \(B, ..., 2, 5, 5\), not \(2, 2, 5, 6\)"),
        (conv(), (2, 5, 5), r"inputs of shape \(B, ..., 2, 5, 5\), not \(2, 5, 5\)"),
        (conv(2, "pooled", size=None), (2, 3, 5, 6), r"inputs of shape \(B, ..., 2, any, any\), not \(2, 3, 5, 6\)"),
    ],
)
def test_inputs_of_another_shape_are_refused(layer, shape, message):
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(shape, dtype=torch.float64))
