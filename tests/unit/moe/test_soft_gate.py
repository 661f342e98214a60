import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from distmoe.moe.experts import MLPExperts, ModuleExperts
from distmoe.moe.gates.soft import SoftGate
from distmoe.moe.groups import RoutingGroups
from distmoe.moe.layer import MoELayer
from distmoe.moe.routing import SlotMixing
from tests.oracles import mlp_experts, slot_weights, soft_mixture_output, softmax
from tests.unit.moe.gate_forms import Given, context, tokens


def test_the_two_softmaxes_by_hand():
    # Two tokens, two experts of one slot. Exponentials: [[1, 2], [3, 2]].
    logits = torch.tensor([[1.0, 2.0], [3.0, 2.0]]).log()
    routing = SoftGate(Given(), 2).route(logits, context(2, rows_per_sample=2))
    mixing = routing.mixing
    torch.testing.assert_close(mixing.into_GNS, torch.tensor([[[1 / 4, 1 / 2], [3 / 4, 1 / 2]]]))
    torch.testing.assert_close(mixing.out_of_GNS, torch.tensor([[[1 / 3, 2 / 3], [3 / 5, 2 / 5]]]))
    slots = mixing.to_slots(torch.tensor([[4.0, 0.0], [0.0, 8.0]]))
    torch.testing.assert_close(slots, torch.tensor([[1.0, 6.0], [2.0, 4.0]]))
    # Slot outputs 30 and 60: token 0 gets 10 + 40, token 1 gets 18 + 24.
    assert mixing.from_slots(torch.tensor([[30.0], [60.0]])).tolist() == [[pytest.approx(50.0)], [pytest.approx(42.0)]]


def test_slots_of_a_group_belong_to_the_experts_in_order():
    routing = SoftGate(Given(), 3, slots_per_expert=2).route(torch.zeros(8, 6), context(8, rows_per_sample=4))
    assert routing.row_ids_A.tolist() == list(range(12))
    assert routing.expert_ids_A.tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert (routing.num_rows, routing.assignments_per_row) == (12, 1)
    assert routing.weights_A.tolist() == [1.0] * 12


def test_a_token_s_probability_of_an_expert_is_its_weight_on_the_expert_s_slots():
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).log()
    routing = SoftGate(Given(), 2, slots_per_expert=2).route(logits, context(1))
    assert routing.probs_TE.tolist() == [[pytest.approx(0.3), pytest.approx(0.7)]]
    assert routing.logits_TE.softmax(1).tolist() == [[pytest.approx(0.3), pytest.approx(0.7)]]


@given(
    num_samples=st.integers(0, 5),
    rows_per_sample=st.integers(1, 4),
    num_experts=st.integers(1, 4),
    slots_per_expert=st.integers(1, 3),
    group=st.sampled_from(["image", "batch", 1, 2, 3]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_the_whole_layer_and_its_gradients_equal_the_loop(
    num_samples, rows_per_sample, num_experts, slots_per_expert, group, seed
):
    torch.manual_seed(seed)
    width, hidden = 3, 2
    gate = SoftGate(torch.nn.Linear(width, num_experts * slots_per_expert), num_experts, slots_per_expert, group)
    experts = MLPExperts(range(num_experts), width, hidden)
    torch.nn.init.normal_(experts.b1)
    moe = MoELayer(gate, experts).double()
    num_rows = num_samples * rows_per_sample
    group_rows = max(num_rows, 1) if group == "batch" else rows_per_sample * (1 if group == "image" else group)
    x = tokens(num_samples, rows_per_sample, width, seed=seed, dtype=torch.float64).requires_grad_()
    leaves = [x, *moe.parameters()]

    y, routing = moe(x, context(num_rows, rows_per_sample))
    functions = mlp_experts(experts.w1, experts.b1, experts.w2, experts.b2, F.gelu)
    logits = gate.network(x.flatten(0, 1))
    expected = soft_mixture_output(x.flatten(0, 1), logits, group_rows, functions).view_as(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    for matrix, by_hand in zip(
        (routing.mixing.into_GNS, routing.mixing.out_of_GNS), slot_weights(logits.tolist(), group_rows), strict=True
    ):
        flat = [weight for row in by_hand for weight in row]
        assert routing.mixing.groups.unfold(matrix).flatten().tolist() == pytest.approx(flat, rel=1e-9)

    towards = tokens(*x.shape, seed=seed + 1, dtype=torch.float64)
    ours = torch.autograd.grad((y * towards).sum(), leaves)
    # The loop leaves no gradient where it touched nothing.
    theirs = torch.autograd.grad((expected * towards).sum(), leaves, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=1e-9, atol=1e-11)


def test_a_last_smaller_group_is_a_group_like_any_other():
    gate = SoftGate(Given(), 3, group=2)
    logits = tokens(10, 3).requires_grad_()
    mixing = gate.route(logits, context(10, rows_per_sample=2)).mixing  # 4 + 4 + 2 rows
    assert mixing.into_GNS.shape == (3, 4, 3)
    torch.testing.assert_close(mixing.into_GNS.sum(1), torch.ones(3, 3))
    assert mixing.into_GNS[2, 2:].tolist() == [[0.0] * 3] * 2
    slots = mixing.to_slots(tokens(10, 5, seed=2))
    alone = gate.route(logits[8:], context(2, rows_per_sample=2)).mixing.to_slots(tokens(10, 5, seed=2)[8:])
    torch.testing.assert_close(slots[6:], alone)
    (mixing.from_slots(slots) * tokens(10, 5, seed=3)).sum().backward()
    assert bool(logits.grad.isfinite().all())
    assert float(logits.grad[8:].abs().min()) > 0.0


def test_a_sample_of_one_token_makes_a_dense_mixture_over_slots():
    logits, x = tokens(4, 3), tokens(4, 2, seed=2)
    mixing = SoftGate(Given(), 3).route(logits, context(4)).mixing
    assert torch.equal(mixing.to_slots(x), x.repeat_interleave(3, 0))
    for weights, row in zip(mixing.out_of_GNS.squeeze(1).tolist(), logits.tolist(), strict=True):
        assert weights == pytest.approx(softmax(row))


def test_tokens_of_any_shape_keep_it_and_half_precision_is_averaged_in_float32():
    mixing = SlotMixing(RoutingGroups(4, 4), torch.full((1, 4, 1), 0.25), torch.ones(1, 4, 1))
    images = torch.tensor([256.0, 1.0, 1.0, 2.0]).view(4, 1, 1, 1).expand(4, 2, 3, 1)
    slots = mixing.to_slots(images.bfloat16())
    assert slots.dtype == torch.bfloat16
    # 260 / 4; added up in bfloat16, 256 + 1 + 1 + 2 would be 258.
    assert torch.equal(slots, torch.full((1, 2, 3, 1), 65.0).bfloat16())
    assert torch.equal(mixing.from_slots(slots), torch.full((4, 2, 3, 1), 65.0))
    numbers = torch.tensor([256.0, 1.0, 1.0, 2.0])
    assert mixing.to_slots(numbers).tolist() == [65.0]
    assert mixing.from_slots(torch.tensor([65.0])).tolist() == [65.0] * 4


def test_autocast_does_not_reach_the_mixing():
    halves = torch.full((1, 2, 2), 0.5)
    mixing = SlotMixing(RoutingGroups(2, 2), halves, halves)
    x = torch.tensor([[256.0], [3.0]])  # 129.5 has 9 bits, one more than bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        slots = mixing.to_slots(x)
        tokens_again = mixing.from_slots(torch.tensor([[129.5], [131.5]]))
    assert slots.tolist() == [[129.5]] * 2
    assert tokens_again.tolist() == [[130.5]] * 2


@pytest.mark.parametrize("way", ["into", "out of"])
def test_gradients_of_both_ways_are_those_of_finite_differences(way):
    groups = RoutingGroups(5, 3)
    weights = tokens(2, 3, 2, dtype=torch.float64).requires_grad_()
    x = tokens(5 if way == "into" else 4, 2, seed=2, dtype=torch.float64).requires_grad_()

    def mixed(weights, x):
        mixing = SlotMixing(groups, weights, weights)
        return mixing.to_slots(x) if way == "into" else mixing.from_slots(x)

    assert torch.autograd.gradcheck(mixed, (weights, x))


def test_detached_mixing_keeps_its_values_and_loses_its_gradient():
    logits = tokens(4, 3).requires_grad_()
    routing = SoftGate(Given(), 3).route(logits, context(4, 2))
    detached = routing.detach()
    assert torch.equal(detached.mixing.into_GNS, routing.mixing.into_GNS)
    assert not detached.mixing.into_GNS.requires_grad
    assert not detached.mixing.out_of_GNS.requires_grad


def test_experts_may_change_the_shape_of_what_they_see():
    torch.manual_seed(0)
    experts = ModuleExperts(range(2), lambda: torch.nn.Conv2d(3, 4, 3))
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 5 * 5, 2))
    moe = MoELayer(SoftGate(network, 2, group="batch"), experts, token_dims=3).double()
    x = tokens(3, 3, 5, 5, dtype=torch.float64)
    y, _ = moe(x, context(3))
    weights = network(x)
    answers = []
    for slot, expert in enumerate(experts.modules_by_id.values()):
        column = softmax(weights[:, slot].tolist())
        answers.append(expert(sum(share * image for share, image in zip(column, x, strict=True)).unsqueeze(0))[0])
    expected = [sum(w * a for w, a in zip(softmax(row), answers, strict=True)) for row in weights.tolist()]
    torch.testing.assert_close(y, torch.stack(expected), rtol=1e-9, atol=1e-11)


def test_fewer_slots_than_one_are_refused():
    with pytest.raises(ValueError, match=r"slots_per_expert \(0\) must be at least 1"):
        SoftGate(Given(), 2, slots_per_expert=0)


def test_logits_of_any_size_give_weights_that_sum_to_one():
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [math.log(2.0), 0.0]])
    mixing = SoftGate(Given(), 2).route(logits, context(3, 3)).mixing
    torch.testing.assert_close(mixing.into_GNS.sum(1), torch.ones(1, 2))
    torch.testing.assert_close(mixing.out_of_GNS.sum(2), torch.ones(1, 3))
