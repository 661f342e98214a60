import math

import pytest
import torch
from torch.nn import functional as F

from distmoe.moe.convolutions import ConvExperts, LinearExperts, Windows
from distmoe.training.optim import split_by_decay

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def seen_by(windows: Windows, length: int) -> list[list[int]]:
    """The input positions of each window over one axis, those in the padding left out."""
    (before, _), (step,), (stride,) = windows.margins([length])[0], windows.dilation, windows.strides
    taps = range(windows.kernel_size[0])
    starts = [count * stride - before for count in range(windows.output_size([length])[0])]
    return [[at for tap in taps if 0 <= (at := start + tap * step) < length] for start in starts]


# What TensorFlow's rule gives for an axis of 5, by hand.
CASES = [
    # kernel, stride, padding, dilation, zeros around, windows
    (3, 1, "valid", 1, (0, 0), [[0, 1, 2], [1, 2, 3], [2, 3, 4]]),
    (2, 2, "valid", 1, (0, 0), [[0, 1], [2, 3]]),
    (2, 1, "valid", 3, (0, 0), [[0, 3], [1, 4]]),
    (3, 1, "same", 1, (1, 1), [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4]]),
    (2, 1, "same", 1, (0, 1), [[0, 1], [1, 2], [2, 3], [3, 4], [4]]),
    (4, 2, "same", 1, (1, 2), [[0, 1, 2], [1, 2, 3, 4], [3, 4]]),  # 3 windows over 2 * 2 + 4 = 8: 3 zeros
    (2, 3, "same", 1, (0, 0), [[0, 1], [3, 4]]),
    (1, 3, "same", 1, (0, 0), [[0], [3]]),
    (3, 1, "same", 2, (2, 2), [[0, 2], [1, 3], [0, 2, 4], [1, 3], [2, 4]]),
    (3, 1, "causal", 1, (2, 0), [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]),
    (2, 1, "causal", 2, (2, 0), [[0], [1], [0, 2], [1, 3], [2, 4]]),
    (3, 2, "causal", 1, (2, 0), [[0], [0, 1, 2], [2, 3, 4]]),
]


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "zeros", "expected"), CASES)
def test_windows_are_those_of_tensorflow(kernel, stride, padding, dilation, zeros, expected):
    windows = Windows.of(1, kernel, stride, padding, dilation)
    assert windows.margins([5]) == [zeros]
    assert seen_by(windows, 5) == expected


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "zeros", "expected"), CASES)
def test_an_expert_sees_its_windows(kernel, stride, padding, dilation, zeros, expected):
    experts = ConvExperts(range(1), 1, 1, Windows.of(1, kernel, stride, padding, dilation), bias=False)
    with torch.no_grad():
        experts.weight.fill_(1.0)
    # Powers of two: the sum of a window tells which positions it saw.
    x = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]).view(1, 1, 5)
    y = experts(x, torch.tensor([1]))
    assert y.flatten().tolist() == [sum(2.0**at for at in window) for window in expected]


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "middles"),
    [
        (3, 1, "valid", 1, [1, 2, 3]),
        (2, 2, "valid", 1, [0, 2]),
        (3, 1, "same", 1, [0, 1, 2, 3, 4]),
        (4, 2, "same", 1, [0, 2, 4]),  # windows from -1, 1 and 3 of four positions
        (3, 2, "same", 1, [0, 2, 4]),
        (3, 1, "same", 2, [0, 1, 2, 3, 4]),
        (3, 1, "causal", 1, [0, 0, 1, 2, 3]),  # the first would be in the padding
        (3, 2, "causal", 1, [0, 1, 3]),
    ],
)
def test_the_middle_of_each_window(kernel, stride, padding, dilation, middles):
    x = torch.arange(10.0).view(1, 2, 5)
    at_middles = Windows.of(1, kernel, stride, padding, dilation).at_middles(x)
    assert at_middles.tolist() == [[middles, [5 + at for at in middles]]]


def test_each_axis_has_its_own_windows():
    windows = Windows.of(3, (1, 2, 3), (2, 1, 1), "same", 1)
    assert windows.margins((4, 4, 4)) == [(0, 0), (0, 1), (1, 1)]
    assert windows.output_size((4, 4, 4)) == (2, 4, 4)
    x = torch.arange(8.0).view(1, 1, 2, 4)
    assert Windows.of(2, (1, 3), (2, 1), "valid", 1).at_middles(x).tolist() == [[[[1.0, 2.0]]]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 3, 2, "same", 2), r"strides \(2\) and dilation \(2\) cannot both be above 1"),
        ((2, 3, (2, 1), "same", (1, 2)), "cannot both be above 1"),
        ((2, 3, 1, "causal", 1), "padding 'causal' is for one dimension, not 2"),
        ((1, 3, 1, "full", 1), "padding 'full' is not one of valid, same, causal"),
        ((2, (3, 3, 3), 1, "same", 1), r"kernel_size \(\(3, 3, 3\)\) must be a positive integer, or 2 of them"),
        ((2, 3, 0, "same", 1), r"strides \(0\) must be a positive integer"),
        ((2, 3, 1, "same", (1, -1)), r"dilation \(\(1, -1\)\) must be a positive integer"),
    ],
)
def test_windows_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Windows.of(*arguments)


def test_an_input_smaller_than_a_window_is_refused():
    windows = Windows.of(2, (3, 2), 1, "valid", (2, 1))
    assert windows.output_size((5, 2)) == (1, 1)
    with pytest.raises(ValueError, match=r"windows of \[5, 2\] positions do not fit an input of \[4, 8\]"):
        windows.output_size((4, 8))


def convolutions(rank: int = 2, **settings) -> ConvExperts:
    torch.manual_seed(0)
    experts = ConvExperts(range(4, 7), 2, 3, Windows.of(rank, 2, 1, "same", 1), **settings)
    with torch.no_grad():  # biases start at zero, which would hide a wrong one
        experts.bias.normal_()
    return experts


@pytest.mark.parametrize("counts", [[2, 2, 1], [0, 5, 0], [3, 0, 2], [5, 0, 0]])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_each_convolution_works_on_its_rows(rank, counts):
    experts = convolutions(rank, activation="tanh")
    rows = torch.randn(5, 2, *(4,) * rank)
    output = experts(rows, torch.tensor(counts))
    expected, start = [], 0
    for index, count in enumerate(counts):
        piece = F.pad(rows[start : start + count], (0, 1) * rank)  # two taps: one zero at the end
        expected.append(CONVOLUTIONS[rank](piece, experts.weight[index], experts.bias[index]).tanh())
        start += count
    torch.testing.assert_close(output, torch.cat(expected), rtol=1e-5, atol=1e-6)  # float32


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("counts", [[2, 2, 1], [0, 5, 0], [3, 0, 2]])
def test_each_linear_map_works_on_its_rows(activation, counts):
    torch.manual_seed(0)
    experts = LinearExperts(range(4, 7), 3, 2, activation)
    with torch.no_grad():
        experts.bias.normal_()
    rows, function = torch.randn(5, 3), {None: torch.clone, "relu": F.relu, "gelu": F.gelu}[activation]
    chosen = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor(counts)).tolist()
    expected = [
        function(row @ experts.weight[index] + experts.bias[index]) for row, index in zip(rows, chosen, strict=True)
    ]
    torch.testing.assert_close(experts(rows, torch.tensor(counts)), torch.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [convolutions, lambda: LinearExperts(range(4, 7), 32, 3, "relu")])
def test_an_expert_without_rows_has_the_gradient_zero(make):
    experts = make()
    rows = torch.randn(5, 2, 4, 4) if isinstance(experts, ConvExperts) else torch.randn(5, 32)
    experts(rows, torch.tensor([3, 0, 2])).square().sum().backward()
    for parameter in (experts.weight, experts.bias):
        assert [bool(parameter.grad[index].abs().sum() > 0) for index in range(3)] == [True, False, True]


def test_rows_of_other_experts_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        convolutions()(torch.randn(5, 2, 4, 4), torch.tensor([2, 3]))


def test_relu_works_in_place_on_nothing_that_others_see():
    torch.manual_seed(0)
    experts = LinearExperts(range(1), 3, 3, "relu", bias=False)
    with torch.no_grad():
        experts.weight.copy_(torch.eye(3))
    rows = torch.tensor([[-1.0, 2.0, -3.0]])
    assert experts(rows, torch.tensor([1])).tolist() == [[0.0, 2.0, 0.0]]
    assert rows.tolist() == [[-1.0, 2.0, -3.0]]


def test_convolutions_start_normal_with_variance_scale_squared_over_fan_in_and_zero_biases():
    torch.manual_seed(0)
    experts = ConvExperts(range(2), 16, 64, Windows.of(2, (3, 5), 1, "same", 1), scale=2.0)
    for weight in experts.weight.detach():
        # 15360 values: their standard deviation is known to 0.57 %, the fourth moment of a normal (3) to 2 % or so.
        assert float(weight.std()) == pytest.approx(2.0 / math.sqrt(16 * 3 * 5), rel=0.03)
        assert float((weight / weight.std()).pow(4).mean()) == pytest.approx(3.0, rel=0.1)
    assert float(experts.bias.detach().abs().sum()) == 0.0
    assert not torch.equal(experts.weight[0], experts.weight[1])


def test_linear_maps_start_uniform_within_the_glorot_bound_and_zero_biases():
    torch.manual_seed(0)
    experts = LinearExperts(range(2), 100, 300, scale=0.5)
    bound = math.sqrt(3 * 0.5 / 200)
    for weight in experts.weight.detach():
        # 30000 values: the largest is within 1e-3 of the bound but for odds of e^-30.
        assert 0.999 * bound < float(weight.abs().max()) <= bound
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert float(experts.bias.detach().abs().sum()) == 0.0


@pytest.mark.parametrize("make", [convolutions, lambda: LinearExperts(range(4, 7), 3, 2)])
def test_resetting_one_expert_leaves_the_others(make):
    experts = make()
    before = experts.weight.detach().clone()
    torch.manual_seed(5)
    experts.reset_expert(1)
    assert [torch.equal(experts.weight[index], before[index]) for index in range(3)] == [True, False, True]
    assert float(experts.bias[1].detach().abs().sum()) == 0.0
    torch.manual_seed(5)
    experts.reset_expert(2)
    assert torch.equal(experts.weight[1], experts.weight[2])  # the draw depends on the generator alone


def test_weights_decay_and_biases_do_not():
    for experts in (convolutions(), LinearExperts(range(2), 3, 2)):
        decayed, rest = split_by_decay(experts)
        assert [id(one) for one in decayed + rest] == [id(experts.weight), id(experts.bias)]


def test_without_biases_there_are_none():
    torch.manual_seed(0)
    experts = ConvExperts(range(2), 2, 3, Windows.of(1, 2, 1, "valid", 1), bias=False)
    assert [name for name, _ in experts.named_parameters()] == ["weight"]
    assert experts(torch.zeros(1, 2, 2), torch.tensor([1, 0])).tolist() == [[[0.0], [0.0], [0.0]]]


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"activation 'softmax' is not one of relu, gelu, .*or None"):
        LinearExperts(range(2), 3, 2, "softmax")
