import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from distmoe.moe.experts import MLPExperts
from distmoe.moe.gates.attentive import AttentiveGate
from distmoe.moe.layer import MoELayer
from distmoe.moe.objectives import log_weights
from tests.oracles import attentive_weights, mixture_output, mlp_experts, top_k_choices
from tests.unit.moe.gate_forms import Given, context, tokens, triples


def test_weights_are_the_softmax_of_query_times_key_by_hand():
    gate = AttentiveGate(Given(), 2, width=4, hidden=1)
    with torch.no_grad():
        gate.query.weight.copy_(2 * torch.eye(4))
        gate.key.weight.copy_(torch.tensor([[1.0], [0.0], [0.0], [3.0]]))
    asked = gate.route(torch.tensor([[1.0, 5.0, 5.0, 0.0], [0.0, 0.0, 0.0, 1.0]]), context(2))
    assert asked.weights_A is None
    assert asked.queries_T.tolist() == [[2.0, 10.0, 10.0, 0.0], [0.0, 0.0, 0.0, 2.0]]
    # Hidden states of experts 0 and 1 for token 0, then for token 1; a key is (h, 0, 0, 3h).
    hidden = torch.tensor([[1.0], [2.0], [0.5], [0.0]])
    routing = gate.weigh(asked, hidden)
    # Token 0: 2 * 1 / 2 and 2 * 2 / 2. Token 1: 2 * 1.5 / 2 and 0.
    assert routing.logits_TE.tolist() == [[1.0, 2.0], [1.5, 0.0]]
    expected = [1 / (1 + 2.718281828), 2.718281828 / (1 + 2.718281828), 4.48168907 / 5.48168907, 1 / 5.48168907]
    assert routing.weights_A.tolist() == pytest.approx(expected)
    assert [triple[:2] for triple in triples(routing)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert routing.queries_T is None


def small_layer(num_experts: int, seed: int, k: int | None = None) -> MoELayer:
    torch.manual_seed(seed)
    gate = AttentiveGate(nn.Linear(3, 4), num_experts, width=4, hidden=2, k=k)
    experts = MLPExperts(range(num_experts), 3, 2, with_hidden=True)
    nn.init.normal_(experts.b1)
    nn.init.normal_(experts.b2)
    return MoELayer(gate, experts).double()


def weights_by_the_loop(moe: MoELayer, x: torch.Tensor) -> list[list[float]]:
    """(T, E): queries and keys of each token and expert, one by one."""
    gate, experts = moe.gate, moe.experts
    rows = []
    for token in x:
        query = gate.query.weight @ (gate.network.weight @ token + gate.network.bias)
        hidden = [token @ experts.w1[e] + experts.b1[e] for e in range(gate.num_experts)]
        rows.append(attentive_weights(query.tolist(), [(gate.key.weight @ one).tolist() for one in hidden]))
    return rows


@given(num_rows=st.integers(0, 5), num_experts=st.integers(1, 5), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40, derandomize=True)
def test_the_whole_layer_equals_the_loop(num_rows, num_experts, seed):
    moe, x = small_layer(num_experts, seed), tokens(num_rows, 3, seed=seed, dtype=torch.float64)
    y, routing = moe(x, context(num_rows))
    weights = weights_by_the_loop(moe, x)
    flat = [weight for row in weights for weight in row]
    assert routing.weights_A.tolist() == pytest.approx(flat, rel=1e-9)
    assert routing.probs_TE.flatten().tolist() == pytest.approx(flat, rel=1e-9)
    assert log_weights(routing).exp().flatten().tolist() == pytest.approx(flat, rel=1e-9)
    experts = moe.experts
    expected = mixture_output(
        x,
        [row for row in range(num_rows) for _ in range(num_experts)],
        list(range(num_experts)) * num_rows,
        torch.tensor(flat, dtype=torch.float64),
        mlp_experts(experts.w1, experts.b1, experts.w2, experts.b2, F.gelu),
    )
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_evaluation_may_keep_the_best_answers_only(k):
    moe, x = small_layer(4, 0, k), tokens(6, 3, dtype=torch.float64)
    _, routing = moe(x, context(6, training=False))
    expected = []
    for weights in weights_by_the_loop(moe, x):
        (chosen,) = top_k_choices([weights], k)
        total = sum(weights[expert] for expert in chosen)
        expected += [weights[expert] / total if expert in chosen else 0.0 for expert in range(4)]
    assert routing.weights_A.tolist() == pytest.approx(expected, rel=1e-9)
    assert moe.gate.experts_per_row == 4.0  # all of them are asked
    with pytest.raises(ValueError, match="k is for evaluation"):
        moe(x, context(6))


def test_experts_without_fitting_hidden_states_are_refused_with_the_reason():
    torch.manual_seed(0)
    gate = AttentiveGate(nn.Linear(3, 4), 2, width=4, hidden=2)
    silent = MoELayer(gate, MLPExperts(range(2), 3, 2))
    with pytest.raises(ValueError, match=r"an attentive gate needs experts that give \(output, hidden state\)"):
        silent(tokens(5, 3))
    wider = MoELayer(gate, MLPExperts(range(2), 3, 6, with_hidden=True))
    with pytest.raises(ValueError, match=r"hidden states of shape \(10, 6\), not \(A, 2\)"):
        wider(tokens(5, 3))


@pytest.mark.parametrize("k", [0, 3])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match=rf"k \({k}\) must be between 1 and the number of experts \(2\)"):
        AttentiveGate(Given(), 2, k=k)


def test_keys_are_as_wide_as_queries_where_nothing_else_is_said():
    # As in the source, where gate and experts have hidden layers of one width.
    gate = AttentiveGate(Given(), 2, width=6)
    assert gate.key.weight.shape == gate.query.weight.shape == (6, 6)
    routing = gate.weigh(gate.route(tokens(1, 6), context(1)), tokens(2, 6, seed=2))
    expected = attentive_weights(
        (gate.query.weight @ tokens(1, 6)[0]).tolist(), [(gate.key.weight @ h).tolist() for h in tokens(2, 6, seed=2)]
    )
    assert routing.weights_A.tolist() == pytest.approx(expected, rel=1e-5)
