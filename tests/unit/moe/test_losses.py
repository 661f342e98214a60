import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from distmoe.moe.losses import (
    LOSSES,
    add_sums,
    auxiliary_losses,
    classification_losses,
    mixture_log_probs,
    negative_log_likelihood,
)
from distmoe.moe.routing import Routing


def routing(probs: list[list[float]] | torch.Tensor, experts: list[list[int]], logits=None) -> Routing:
    """Row t goes to the experts experts[t]; logits are log probabilities unless given."""
    probs_TE = torch.as_tensor(probs)
    row_ids = [row for row, chosen in enumerate(experts) for _ in chosen]
    expert_ids = [expert for chosen in experts for expert in chosen]
    return Routing(
        num_rows=len(experts),
        num_experts=probs_TE.shape[-1],
        row_ids_A=torch.tensor(row_ids, dtype=torch.long),
        expert_ids_A=torch.tensor(expert_ids, dtype=torch.long),
        weights_A=torch.ones(len(row_ids)),
        logits_TE=probs_TE.log() if logits is None else torch.as_tensor(logits),
        probs_TE=probs_TE,
    )


def value(name: str, one: Routing) -> float:
    return float(LOSSES[name].loss(LOSSES[name].sums(one)))


EVEN = [[0.25] * 4] * 8
COLLAPSED = [[1.0, 0.0, 0.0, 0.0]] * 8


def test_at_balance():
    spread = routing(EVEN, [[row % 4] for row in range(8)])
    # f_e = P_e = 1/4: 4 * 4 * 1/16.
    assert value("load_balance", spread) == pytest.approx(1.0)
    assert value("importance", spread) == 0.0


def test_at_collapse():
    collapsed = routing(COLLAPSED, [[0]] * 8)
    # f = P = (1, 0, 0, 0): 4 * 1.
    assert value("load_balance", collapsed) == pytest.approx(4.0)
    # I = (8, 0, 0, 0), mean 2, unbiased variance (36 + 3 * 4) / 3 = 16: 16 / 4.
    assert value("importance", collapsed) == pytest.approx(4.0)


def test_load_balance_counts_assignments_and_averages_probabilities():
    # P = (0.675, 0.325), f = (1, 0): 2 * 0.675.
    assert value("load_balance", routing([[0.75, 0.25], [0.6, 0.4]], [[0], [0]])) == pytest.approx(1.35)
    # Three experts, two choices a row: f = (2, 1, 1) / 4, P = (0.4, 0.35, 0.25):
    # 3 * (0.5 * 0.4 + 0.25 * 0.35 + 0.25 * 0.25) = 3 * 0.35.
    two_choices = routing([[0.5, 0.3, 0.2], [0.3, 0.4, 0.3]], [[0, 1], [0, 2]])
    assert value("load_balance", two_choices) == pytest.approx(1.05)
    # After a drop only what was kept counts: f = (1, 0), although row 1 has no expert.
    assert value("load_balance", routing([[0.75, 0.25], [0.6, 0.4]], [[0], []])) == pytest.approx(1.35)


def test_load_balance_has_a_gradient_through_the_probabilities():
    logits = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.2, 0.1]], dtype=torch.float64, requires_grad=True)
    one = routing(logits.softmax(-1), [[0], [0]], logits)
    LOSSES["load_balance"].loss(LOSSES["load_balance"].sums(one)).backward()
    # d/dP_te = E * f_e / T = 3 * (1, 0, 0) / 2, so d/dlogit_te = 1.5 * p_0 * (delta_e0 - p_e).
    p = logits.detach().softmax(-1)
    expected = 1.5 * p[:, :1] * (torch.tensor([1.0, 0.0, 0.0]) - p)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-12)


def test_importance_uses_the_unbiased_variance():
    # I = (3, 1), mean 2, unbiased variance (1 + 1) / 1 = 2: 2 / 4. The biased one would give 0.25.
    one = routing([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]], [[0]] * 4)
    assert value("importance", one) == pytest.approx(0.5)


def test_importance_of_one_expert_is_zero_with_a_gradient():
    probs = torch.ones(3, 1, requires_grad=True)
    loss = LOSSES["importance"].loss(LOSSES["importance"].sums(routing(probs, [[0]] * 3)))
    loss.backward()
    assert (float(loss.detach()), probs.grad.tolist()) == (0.0, [[0.0]] * 3)


def test_z_is_the_mean_squared_log_sum_exp():
    # log(1 + 1 + 1 + 1) = log 4; log(2 + 3) = log 5 among two experts.
    assert value("z", routing(EVEN, [[0]] * 8, torch.zeros(8, 4))) == pytest.approx(math.log(4) ** 2)
    logits = torch.tensor([[2.0, 3.0], [1.0, 1.0]]).log()
    expected = (math.log(5) ** 2 + math.log(2) ** 2) / 2
    assert value("z", routing(logits.softmax(-1), [[0], [0]], logits)) == pytest.approx(expected)
    # Shifting all logits changes z but no probability: at log 4 + 1, say.
    assert value("z", routing(EVEN, [[0]] * 8, torch.ones(8, 4))) == pytest.approx((math.log(4) + 1) ** 2)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_no_row_costs_nothing(name):
    assert value(name, routing(torch.zeros(0, 4), [])) == 0.0


@pytest.mark.parametrize("name", sorted(LOSSES))
@given(num_rows=st.integers(2, 8), num_experts=st.integers(1, 5), seed=st.integers(0, 99), data=st.data())
@settings(deadline=None, max_examples=15, derandomize=True)
def test_sums_add_up_over_any_split_of_the_tokens(name, num_rows, num_experts, seed, data):
    cut = data.draw(st.integers(0, num_rows))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, num_experts, generator=generator, dtype=torch.float64)
    experts = torch.randint(0, num_experts, (num_rows, 2), generator=generator).tolist()

    def part(rows: slice) -> Routing:
        return routing(logits[rows].softmax(-1), experts[rows], logits[rows])

    sums = LOSSES[name].sums(part(slice(0, cut)))
    add_sums(sums, LOSSES[name].sums(part(slice(cut, num_rows))))
    expected = value(name, part(slice(0, num_rows)))
    assert float(LOSSES[name].loss(sums)) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_auxiliary_losses_are_averaged_over_layers_and_only_where_weighted():
    layers = {
        "first": routing(EVEN, [[row % 4] for row in range(8)]),
        "second": routing(COLLAPSED, [[0]] * 8),
    }
    losses = auxiliary_losses(layers, {"load_balance": 0.01, "importance": 2.0, "z": 0.0})
    # (1 + 4) / 2 and (0 + 4) / 2, whatever the weights.
    assert {name: float(loss) for name, loss in losses.items()} == pytest.approx(
        {"load_balance": 2.5, "importance": 2.0}
    )
    assert auxiliary_losses({}, {"load_balance": 0.01}) == {}


def test_auxiliary_losses_go_through_the_reducer_once_a_layer():
    seen = []

    def doubled(sums):
        seen.append(sorted(sums))
        return {name: tensor * 2 for name, tensor in sums.items()}

    one = routing([[0.9, 0.1]], [[0]], torch.zeros(1, 2))
    # Twice the squares over twice the rows: as before. It is not the loss that is reduced.
    losses = auxiliary_losses({"a": one, "b": one}, {"z": 1.0}, doubled)
    assert float(losses["z"]) == pytest.approx(math.log(2) ** 2)
    assert seen == [["rows", "squares"]] * 2


def dense(logits: torch.Tensor) -> Routing:
    num_rows, num_experts = logits.shape
    return routing(logits.softmax(-1), [list(range(num_experts))] * num_rows, logits)


def test_a_mixture_is_the_weighted_sum_of_the_experts_probabilities():
    # Gate odds 1 : 3 and 1 : 1; two experts, three classes.
    gate = torch.tensor([[1.0, 3.0], [1.0, 1.0]], dtype=torch.float64).log()
    experts = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.2, 0.2], [0.1, 0.8, 0.1], [0.4, 0.4, 0.2]], dtype=torch.float64)
    # Row 0: 0.25 * expert 0 + 0.75 * expert 1; row 1: the plain mean of its two.
    expected = torch.tensor([[0.5, 0.225, 0.275], [0.25, 0.6, 0.15]], dtype=torch.float64)
    torch.testing.assert_close(mixture_log_probs(experts.log(), dense(gate)).exp(), expected, rtol=1e-12, atol=0)


def test_gradients_of_the_mixture_are_prior_minus_posterior():
    generator = torch.Generator().manual_seed(0)
    num_rows, num_experts, num_classes = 4, 3, 5
    gate = torch.randn(num_rows, num_experts, generator=generator, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(num_rows * num_experts, num_classes, generator=generator, dtype=torch.float64)
    scores.requires_grad_()
    labels = torch.tensor([0, 4, 2, 2])
    log_probs = scores.log_softmax(-1)
    negative_log_likelihood(mixture_log_probs(log_probs, dense(gate)), labels).sum().backward()
    for row in range(num_rows):
        prior = [float(p) for p in gate.detach()[row].softmax(-1)]
        likelihood = [float(log_probs.detach()[row * num_experts + e, labels[row]].exp()) for e in range(num_experts)]
        total = sum(g * p for g, p in zip(prior, likelihood, strict=True))
        posterior = [g * p / total for g, p in zip(prior, likelihood, strict=True)]
        # d(-log sum_e g_e p_e) / d gate logit_e = g_e - h_e.
        assert gate.grad[row].tolist() == pytest.approx([g - h for g, h in zip(prior, posterior, strict=True)])
        for expert in range(num_experts):
            # An expert learns in proportion to its posterior: h_e * (softmax - one-hot).
            expected = scores.detach()[row * num_experts + expert].softmax(-1)
            expected[labels[row]] -= 1
            expected *= posterior[expert]
            assert scores.grad[row * num_experts + expert].tolist() == pytest.approx(expected.tolist())


def test_extreme_gates_and_experts_do_not_underflow():
    gate = torch.tensor([[0.0, -500.0]], requires_grad=True)  # e^-500 is 0 in float32
    experts = torch.tensor([[0.0, -400.0], [-1.0, 0.0]]).log_softmax(-1).requires_grad_()
    log_probs = mixture_log_probs(experts, dense(gate))
    # Class 1: max(0 - 400, -500 - 0.3) = -400; class 0: 0.
    assert log_probs[0].tolist() == pytest.approx([0.0, -400.0], abs=1e-4)
    log_probs[0, 1].backward()
    assert torch.isfinite(gate.grad).all()
    # The posterior of expert 1 is e^(-500.3 + 400): nothing. Of expert 0 it is 1, as is its prior.
    assert gate.grad[0].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_a_mixture_of_no_rows_is_empty():
    assert mixture_log_probs(torch.zeros(0, 5), dense(torch.zeros(0, 3))).shape == (0, 5)


def test_a_mixture_needs_a_dense_gate():
    with pytest.raises(ValueError, match="needs a dense gate"):
        mixture_log_probs(torch.zeros(2, 5), routing(EVEN[:2], [[0], [1]]))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_is_that_of_torch_for_logits_and_for_log_probabilities(label_smoothing):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 4, generator=generator), torch.tensor([0, 1, 2, 3, 3, 0])
    expected = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    torch.testing.assert_close(negative_log_likelihood(logits.log_softmax(-1), labels, label_smoothing), expected)
    torch.testing.assert_close(classification_losses(logits, labels, label_smoothing), expected)


def test_label_smoothing_by_hand():
    # Targets (0.9 + 0.05, 0.05) for smoothing 0.1 of two classes.
    loss = negative_log_likelihood(torch.tensor([[0.8, 0.2]]).log(), torch.tensor([0]), 0.1)
    assert float(loss) == pytest.approx(-(0.95 * math.log(0.8) + 0.05 * math.log(0.2)))


def test_half_precision_logits_are_widened_and_float64_is_kept():
    logits = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    loss = classification_losses(logits, torch.tensor([0]))
    assert loss.tolist() == pytest.approx([math.log(1 + math.e)], rel=1e-6)
    precise = classification_losses(torch.tensor([[0.0, 1e-12]], dtype=torch.float64), torch.tensor([0]))
    assert float(precise) - math.log(2) == pytest.approx(5e-13, rel=1e-2)  # log((1 + e^x) / 1) = log 2 + x / 2


@pytest.mark.parametrize(
    ("name", "missing"), [("load_balance", "probs_TE"), ("importance", "probs_TE"), ("z", "logits_TE")]
)
def test_a_gate_without_scores_is_refused(name, missing):
    one = routing(EVEN, [[0]] * 8)
    bare = type(one)(**{**vars(one), missing: None})
    with pytest.raises(ValueError, match="needs a gate with"):
        value(name, bare)
