import math

import pytest
import torch
from torch.nn import functional as F

from distmoe.config import CNNNetwork, CosineNetwork, LinearNetwork, MLPNetwork
from distmoe.moe.networks import MLP, PooledCNN, network_factory
from tests.oracles import cosine
from tests.unit.moe.gate_forms import tokens


def test_an_mlp_has_relu_between_its_layers_and_not_after_the_last():
    mlp = MLP((2, 2, 1))
    with torch.no_grad():
        mlp.layers[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        mlp.layers[0].bias.copy_(torch.tensor([0.0, -1.0]))
        mlp.layers[1].weight.copy_(torch.tensor([[1.0, -2.0]]))
        mlp.layers[1].bias.copy_(torch.tensor([-5.0]))
    # (3, 0.5): hidden 3 and -0.5 -> 0. (-1, 4): hidden -1 -> 0 and 3.
    assert mlp(torch.tensor([[3.0, 0.5], [-1.0, 4.0]])).tolist() == [[-2.0], [-11.0]]


def test_an_mlp_without_hidden_layers_is_one_linear_layer_on_the_flattened_token():
    torch.manual_seed(0)
    mlp, x = MLP((12, 5)), tokens(3, 2, 3, 2)
    torch.testing.assert_close(mlp(x), x.flatten(1) @ mlp.layers[0].weight.T + mlp.layers[0].bias)


def test_a_cnn_is_convolution_relu_and_pool_then_two_linear_layers():
    torch.manual_seed(0)
    cnn = PooledCNN((3, 7, 9), (4, 5), hidden=6, num_outputs=2, with_hidden=True)
    x = tokens(4, 3, 7, 9)
    scores, hidden = cnn(x)
    expected = x
    for convolution in cnn.convolutions:
        padded = F.pad(expected, (1, 1, 1, 1))
        height, width = expected.shape[2:]
        windows = padded.unfold(2, 3, 1).unfold(3, 3, 1)  # (B, C, H, W, 3, 3)
        expected = torch.einsum("bchwij,ocij->bohw", windows, convolution.weight) + convolution.bias[:, None, None]
        expected = expected.relu()[:, :, : height // 2 * 2, : width // 2 * 2]
        expected = expected.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax(dim=(3, 5))
    expected = expected.flatten(1) @ cnn.fc1.weight.T + cnn.fc1.bias
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)  # float32, another order of summation
    torch.testing.assert_close(scores, expected.relu() @ cnn.fc2.weight.T + cnn.fc2.bias, rtol=1e-4, atol=1e-5)
    cnn.with_hidden = False
    assert torch.equal(cnn(x), scores)


@pytest.mark.parametrize(
    ("section", "num_parameters"),
    [
        (LinearNetwork(), 4 * 6),
        (MLPNetwork(hidden=(5, 3)), 6 * 5 + 5 + 5 * 3 + 3 + 3 * 4 + 4),
        (CosineNetwork(), 6 * 4 + 1),
    ],
)
@pytest.mark.parametrize("shape", [(6,), (2, 3), (6, 1, 1), (3, 1, 2)])
def test_any_network_of_vectors_sees_the_flattened_token_of_any_shape(section, num_parameters, shape):
    torch.manual_seed(0)
    network = network_factory(section, shape)(4)
    assert sum(parameter.numel() for parameter in network.parameters()) == num_parameters
    torch.manual_seed(0)
    flat = network_factory(section, (6,))(4)
    x = tokens(5, *shape)
    assert torch.equal(network(x), flat(x.flatten(1)))
    assert network(x[:0]).shape == (0, 4)


def test_a_linear_network_has_no_bias():
    torch.manual_seed(0)
    network = network_factory(LinearNetwork(), (3,))(2)
    assert network(torch.zeros(1, 3)).tolist() == [[0.0, 0.0]]
    torch.testing.assert_close(network(tokens(4, 3)), tokens(4, 3) @ network.weight.T)


def test_a_cosine_network_gives_cosines_over_its_temperature():
    torch.manual_seed(0)
    network = network_factory(CosineNetwork(temperature=0.25), (3,))(2)
    for row, token in zip(network(tokens(4, 3)).tolist(), tokens(4, 3).tolist(), strict=True):
        assert row == pytest.approx([4 * cosine(token, one) for one in network.directions.T.tolist()], rel=1e-5)


def test_a_cnn_sees_images_and_patches_and_takes_none():
    for shape in ((3, 8, 8), (1, 5, 9)):
        network = network_factory(CNNNetwork(channels=(2, 3), hidden=4), shape)(6)
        pooled = math.prod(size // 4 for size in shape[1:])
        assert network.fc1.in_features == 3 * pooled
        assert network(tokens(2, *shape)).shape == (2, 6)
        x = torch.zeros(0, *shape, requires_grad=True)
        network(x).sum().backward()
        assert [float(parameter.grad.abs().sum()) for parameter in network.parameters()] == [0.0] * 8


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((12,), r"a CNN needs tokens of shape \(channels, height, width\), not \[12\]"),
        ((3, 3, 8), "2 pools leave nothing of a 3x8 image: use fewer channels entries"),
    ],
)
def test_a_token_that_does_not_fit_a_cnn_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        network_factory(CNNNetwork(channels=(2, 3)), shape)(4)
