import io

import pytest
import torch

from distmoe.contracts import Context
from distmoe.models.initial import initialize_parameters
from distmoe.moe.dispatch import Placement
from distmoe.moe.losses import ImportanceLoss, ZLoss
from distmoe.moe.measures import describe_routing, routing_sums
from distmoe.moe.mixtures import Conv2dMoE
from tests.threads import assert_equal_bits_on_two_threads
from tests.unit.moe.little_mixtures import EXACT, LAYERS, every_layer, layer_and_input

# The routing.


@pytest.mark.parametrize("gate_activation", [None, "sigmoid", "softmax"])
@pytest.mark.parametrize(
    ("name", "logits", "weights"),
    [("dense", (3, 3), (9,)), ("1d, full", (3, 4, 3), (9, 4)), ("2d, position", (3, 25, 3), (9, 1, 5, 5))],
)
def test_a_routing_gives_every_expert_every_row_with_a_weight_a_filter_or_position(
    name, logits, weights, gate_activation
):
    layer, x = layer_and_input(name, gate_activation=gate_activation)
    _, routing = layer(x)
    assert routing.row_ids_A.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert routing.expert_ids_A.tolist() == [0, 1, 2] * 3
    assert (routing.logits_TE.shape, routing.weights_A.shape) == (logits, weights)
    function = {None: torch.clone, "sigmoid": torch.sigmoid, "softmax": lambda values: values.softmax(-1)}
    expected = function[gate_activation](routing.logits_TE)
    assert (routing.probs_TE is None) == (gate_activation != "softmax")
    assert routing.probs_TE is None or torch.equal(routing.probs_TE, expected)
    for number in range(9):  # assignment by assignment
        row, expert = divmod(number, 3)
        assert torch.equal(routing.weights_A[number].flatten(), expected[row, ..., expert].flatten())


def test_a_routing_keeps_what_the_gate_saw_without_gradient():
    layer, x = layer_and_input("1d, full")
    routing = layer.gate.route(x.requires_grad_(), Context(0, 0, torch.arange(1), True, rows_per_sample=3))
    assert torch.equal(routing.tokens_T, x)
    assert not routing.tokens_T.requires_grad
    assert (routing.num_rows, routing.rows_per_sample) == (3, 3)


def test_losses_and_measures_take_the_routing():
    layer, x = layer_and_input("2d, full")
    _, routing = layer(x)
    probs, logits = routing.probs_TE.reshape(12, 3), routing.logits_TE.reshape(12, 3)  # 3 images of 4 filters
    importance = probs.sum(0)
    torch.testing.assert_close(ImportanceLoss().value(routing), (importance.std() / importance.mean()) ** 2)
    torch.testing.assert_close(ZLoss().value(routing), logits.logsumexp(1).square().mean())
    entropy = -(probs * probs.log2()).sum(1).mean()
    numbers = describe_routing(routing_sums(routing))
    assert numbers["gate_entropy_bits"] == pytest.approx(float(entropy.detach()))
    assert numbers["load_imbalance"] == 1.0


# What every layer promises.


@every_layer
def test_gradients_are_those_of_finite_differences(name):
    layer, x = layer_and_input(name, rows=1, num_experts=2)
    leaves = (x.requires_grad_(), *layer.parameters())
    assert torch.autograd.gradcheck(lambda *_: layer(x)[0], leaves, fast_mode=True)


@every_layer
def test_samples_do_not_see_one_another(name):
    layer, x = layer_and_input(name, rows=4)
    order = torch.tensor([2, 0, 3, 1])
    y = layer(x)[0]
    torch.testing.assert_close(layer(x[order])[0], y[order], **EXACT)
    torch.testing.assert_close(layer(x[:1])[0], y[:1], **EXACT)


@every_layer
def test_no_rows_give_no_output_and_zero_gradients(name):
    layer, x = layer_and_input(name, rows=0)
    y, routing = layer(x.requires_grad_())
    assert y.shape == (0, *layer(torch.zeros(1, *x.shape[1:], dtype=x.dtype))[0].shape[1:])
    assert len(routing.row_ids_A) == 0
    y.sum().backward()
    assert {float(parameter.grad.abs().sum()) for parameter in layer.parameters()} == {0.0}
    assert x.grad.shape == x.shape


@every_layer
def test_the_layout_in_memory_does_not_matter(name):
    layer, x = layer_and_input(name)
    backwards = x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    every_other = torch.stack([x, x], dim=-1)[..., 0]
    for strided in (backwards, every_other):
        assert not strided.is_contiguous()
        torch.testing.assert_close(layer(strided)[0], layer(x)[0], **EXACT)


@every_layer
def test_more_leading_axes_are_more_tokens_of_a_sample(name):
    layer, x = layer_and_input(name, rows=6)
    y, routing = layer(x.unflatten(0, (3, 2)))
    torch.testing.assert_close(y, layer(x)[0].unflatten(0, (3, 2)), **EXACT)
    assert (routing.num_rows, routing.rows_per_sample) == (6, 2)


@every_layer
def test_a_saved_layer_gives_the_same_bits_in_a_fresh_one(name):
    layer, x = layer_and_input(name)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = LAYERS[name][0]()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    fresh.eval()
    assert torch.equal(fresh(x)[0], layer(x)[0])
    assert torch.equal(fresh(x)[0], fresh(x, Context(7, 7, torch.arange(3), False))[0])


@every_layer
def test_autocast_is_for_the_experts_alone(name):
    layer, x = layer_and_input(name)
    layer, x = layer.float(), x.float()
    y, routing = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_half, routing_half = layer(x)
    if routing.logits_TE is not None:
        assert torch.equal(routing.logits_TE, routing_half.logits_TE)
    assert torch.equal(routing.weights_A, routing_half.weights_A)
    assert y_half.dtype == torch.float32
    assert not torch.equal(y, y_half)
    # bfloat16 keeps 8 bits: sums of up to 54 products of size below 1, weighed to at most 1, are off by a few 2^-8.
    torch.testing.assert_close(y_half, y, rtol=0.05, atol=0.05)


@every_layer
def test_initial_values_depend_on_the_expert_and_not_on_where_it_lives(name):
    some = Placement(local_experts=lambda num_experts: range(1, 3))
    whole, part = layer_and_input(name)[0], layer_and_input(name, placement=some)[0]
    for layer in (whole, part):
        initialize_parameters(layer, seed=3)
    for key, value in part.state_dict().items():
        other = whole.state_dict()[key]
        assert torch.equal(value, other[1:3] if key.startswith("experts.") else other), key
    rows = torch.randn(4, *LAYERS[name][1], dtype=torch.float64)
    everywhere = whole.experts(torch.cat([rows] * 3), torch.tensor([4, 4, 4]))
    assert torch.equal(part.experts(torch.cat([rows] * 2), torch.tensor([4, 4])), everywhere[4:])


def test_two_threads_give_the_same_bits_every_time():
    layer = Conv2dMoE(4, 8, 2, 3, 12, padding="same", expert_activation="relu", gate_activation="softmax")
    x = torch.randn(4, 4, 12, 12)

    def once() -> list[torch.Tensor]:
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y, _ = layer(leaf)
        y.square().sum().backward()
        return [y.detach(), leaf.grad, *(parameter.grad.clone() for parameter in layer.parameters())]

    assert_equal_bits_on_two_threads(once)
