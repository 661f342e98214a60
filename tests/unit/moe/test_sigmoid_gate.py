import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distmoe.moe.gates.sigmoid import SigmoidGate
from tests.oracles import sigmoid, top_k_choices
from tests.unit.moe.gate_forms import Given, context, triples


def with_bias(gate: SigmoidGate, bias: list[float]) -> SigmoidGate:
    gate.balancer.bias_E += torch.tensor(bias)
    return gate


# Sigmoids 0.2, 0.5, 0.6 and 0.75.
SCORES = torch.tensor([[0.25, 1.0, 1.5, 3.0]]).log()


def test_scores_are_sigmoids_and_weights_their_shares():
    routing = SigmoidGate(Given(), 4).route(SCORES, context(1))
    assert [triple[:2] for triple in triples(routing)] == [(0, 3), (0, 2)]
    assert routing.weights_A.tolist() == pytest.approx([0.75 / 1.35, 0.6 / 1.35])
    assert routing.probs_TE[0].tolist() == pytest.approx([one / 2.05 for one in (0.2, 0.5, 0.6, 0.75)])


def test_the_bias_changes_the_choice_and_not_the_weights():
    # Biased scores 0.62, 0.5, 0.6 and 0.55: experts 0 and 2, weighted by 0.2 and 0.6.
    gate = with_bias(SigmoidGate(Given(), 4, renormalize=False), [0.42, 0.0, 0.0, -0.2])
    routing = gate.route(SCORES, context(1))
    assert [triple[:2] for triple in triples(routing)] == [(0, 0), (0, 2)]
    assert routing.weights_A.tolist() == pytest.approx([0.2, 0.6])
    renormalised = with_bias(SigmoidGate(Given(), 4, scale=2.5), [0.42, 0.0, 0.0, -0.2])
    assert renormalised.route(SCORES, context(1)).weights_A.tolist() == pytest.approx([2.5 * 0.25, 2.5 * 0.75])


def test_the_bias_follows_the_load_before_capacity():
    gate = SigmoidGate(Given(), 4, bias_rate=0.1, capacity_factor=0.5, group="batch")
    routing = gate.route(SCORES.expand(6, 4), context(6))
    assert routing.rows_per_expert().tolist() == [0, 0, 2, 2]  # ceil(0.5 * 2 * 6 / 4)
    gate.balancer.update(gate.balancer.sums(routing))
    # Mean load 3: experts 0 and 1 had none, 2 and 3 were chosen six times each.
    assert gate.balancer.bias_E.tolist() == pytest.approx([0.1, 0.1, -0.1, -0.1])


@given(
    num_experts=st.integers(1, 6),
    k=st.integers(1, 6),
    renormalize=st.booleans(),
    scale=st.sampled_from([1.0, 2.5]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_choice_and_weights_equal_the_loop(num_experts, k, renormalize, scale, seed):
    k = min(k, num_experts)
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(5, num_experts, generator=generator, dtype=torch.float64)
    bias = torch.randn(num_experts, generator=generator)
    gate = with_bias(SigmoidGate(Given(), num_experts, k, renormalize=renormalize, scale=scale), bias.tolist())
    routing = gate.route(logits, context(5, training=False))
    expected = []
    for row in logits.tolist():
        scores = [sigmoid(one) for one in row]
        (chosen,) = top_k_choices([[s + b for s, b in zip(scores, bias.tolist(), strict=True)]], k)
        total = sum(scores[expert] for expert in chosen) if renormalize else 1.0
        expected += [(expert, scale * scores[expert] / total) for expert in chosen]
    assert routing.expert_ids_A.tolist() == [expert for expert, _ in expected]
    assert routing.weights_A.tolist() == pytest.approx([weight for _, weight in expected], rel=1e-9)


def test_weights_far_below_zero_keep_their_ratio():
    # Every sigmoid is 0 in float32; their ratios are those of their logits' exponentials.
    logits = torch.tensor([[-200.0, -200.0 - math.log(3.0), -300.0]])
    routing = SigmoidGate(Given(), 3).route(logits, context(1))
    assert routing.probs_TE[0].tolist() == pytest.approx([0.75, 0.25, 0.0], rel=1e-5)
    assert routing.weights_A.tolist() == pytest.approx([0.75, 0.25], rel=1e-5)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"bias_rate \(-1.0\) must be at least 0"):
        SigmoidGate(Given(), 4, bias_rate=-1.0)
    with pytest.raises(ValueError, match="renormalize=False"):
        SigmoidGate(Given(), 4, k=1).route(SCORES, context(1))
    alone = SigmoidGate(Given(), 4, k=1, renormalize=False).route(SCORES, context(1))
    assert alone.weights_A.tolist() == pytest.approx([0.75])
