"""Objectives of mixtures against loops over cases and experts, and the identities of Jacobs et al. 1991."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distmoe.contracts import Context
from distmoe.moe.gates.topk import TopKGate
from distmoe.moe.objectives import (
    ClassObjective,
    classification_losses,
    competitive_error,
    cooperative_error,
    draw_assignments,
    log_weights,
    mixture_log_probs,
    negative_log_likelihood,
    sampled_error,
    smoothed_targets,
    squared_errors,
)
from distmoe.moe.routing import Routing
from tests.unit.moe.handmade import dense_routing, routing

T, E, D = 4, 3, 2  # cases, experts, width of a target


def random(*shape: int, number: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


def context(num_samples: int = T, **keys: int) -> Context:
    return Context(**{"seed": 0, "step": 0, **keys}, sample_ids=torch.arange(num_samples), training=True)


# --- weights and mixtures of class probabilities


def test_a_mixture_is_the_weighted_sum_of_the_experts_probabilities():
    # Gate odds 1 : 3 and 1 : 1; two experts, three classes.
    gate = torch.tensor([[1.0, 3.0], [1.0, 1.0]], dtype=torch.float64).log()
    experts = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.2, 0.2], [0.1, 0.8, 0.1], [0.4, 0.4, 0.2]], dtype=torch.float64)
    # Row 0: 0.25 * expert 0 + 0.75 * expert 1; row 1: the plain mean of its two.
    expected = torch.tensor([[0.5, 0.225, 0.275], [0.25, 0.6, 0.15]], dtype=torch.float64)
    torch.testing.assert_close(
        mixture_log_probs(experts.log(), dense_routing(gate)).exp(), expected, rtol=1e-12, atol=0
    )


def test_a_mixture_of_the_chosen_experts_has_their_renormalised_weights():
    # Odds 1 : 2 : 5 among three experts; the two best are experts 2 and 1, with 5/7 and 2/7.
    gate = TopKGate(torch.nn.Identity(), 3, k=2)
    one = gate.route(torch.tensor([[1.0, 2.0, 5.0]], dtype=torch.float64).log(), context(1))
    assert log_weights(one).exp().tolist()[0] == pytest.approx([5 / 7, 2 / 7])
    best, second = [0.9, 0.1], [0.2, 0.8]
    mixed = mixture_log_probs(torch.tensor([best, second], dtype=torch.float64).log(), one).exp()
    assert mixed.tolist()[0] == pytest.approx([(5 * 0.9 + 2 * 0.2) / 7, (5 * 0.1 + 2 * 0.8) / 7])


def test_weights_of_other_gates_are_taken_as_they_are():
    one = dataclasses.replace(routing([[0.5, 0.5]], [[0, 1]]), weights_A=torch.tensor([0.25, 0.75]))
    assert log_weights(one).exp().tolist()[0] == pytest.approx([0.25, 0.75])
    none = dataclasses.replace(one, weights_A=torch.tensor([0.0, 1.0]))
    assert log_weights(none).exp().tolist()[0] == pytest.approx([0.0, 1.0], abs=1e-30)
    assert torch.isfinite(log_weights(none)).all()


def test_gradients_of_the_mixture_are_prior_minus_posterior():
    num_rows, num_experts, num_classes = 4, 3, 5
    gate = random(num_rows, num_experts).requires_grad_()
    scores = random(num_rows * num_experts, num_classes, number=1).requires_grad_()
    labels = torch.tensor([0, 4, 2, 2])
    log_probs = scores.log_softmax(-1)
    negative_log_likelihood(mixture_log_probs(log_probs, dense_routing(gate)), labels).sum().backward()
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
    log_probs = mixture_log_probs(experts, dense_routing(gate))
    # Class 1: max(0 - 400, -500 - 0.3) = -400; class 0: 0.
    assert log_probs[0].tolist() == pytest.approx([0.0, -400.0], abs=1e-4)
    log_probs[0, 1].backward()
    assert torch.isfinite(gate.grad).all()
    # The posterior of expert 1 is e^(-500.3 + 400): nothing. Of expert 0 it is 1, as is its prior.
    assert gate.grad[0].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_an_excluded_expert_has_no_part_in_any_objective():
    gate = torch.tensor([[0.5, 2.0, -0.5]], dtype=torch.float64, requires_grad=True)
    masked = dense_routing(gate.masked_fill(torch.tensor([False, True, False]), -torch.inf))
    without = dense_routing(gate[:, [0, 2]])
    scores = random(3, 4).requires_grad_()
    for name in ("cooperative", "competitive", "gaussian_mixture", "root_likelihood", "sampled"):
        log_probs = scores.log_softmax(-1)
        loss = ClassObjective(name, log_probs, masked, context(1))(torch.tensor([1]))
        fewer = ClassObjective(name, log_probs[[0, 2]], without, context(1))(torch.tensor([1]))
        assert float(loss.detach()) == pytest.approx(float(fewer.detach())), name
        gradients = torch.autograd.grad(loss.sum(), (gate, scores), retain_graph=True)
        assert all(torch.isfinite(gradient).all() for gradient in gradients), name
        assert gradients[0][0, 1] == 0.0, name
        assert (gradients[1][1] == 0.0).all(), name


def test_a_mixture_of_no_rows_is_empty():
    assert mixture_log_probs(torch.zeros(0, 5), dense_routing(torch.zeros(0, 3))).shape == (0, 5)


@pytest.mark.parametrize("name", ["cooperative", "competitive", "gaussian_mixture", "root_likelihood", "sampled"])
def test_objectives_of_no_rows_have_zero_gradients(name):
    gate, scores = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 5, requires_grad=True)
    losses = ClassObjective(name, scores.log_softmax(-1), dense_routing(gate), context(0))(torch.zeros(0).long())
    losses.sum().backward()
    assert (losses.shape, gate.grad.shape, scores.grad.shape) == ((0,), (0, 3), (0, 5))


def test_a_mixture_needs_a_weight_for_every_row_and_expert():
    with pytest.raises(ValueError, match="3 assignments are not equally many for each of 2 rows"):
        mixture_log_probs(torch.zeros(3, 5), routing([[0.5, 0.5]] * 2, [[0, 1], [1]]))
    with pytest.raises(ValueError, match="one weight an expert"):
        mixture_log_probs(torch.zeros(4, 5), dense_routing(torch.zeros(2, 3, 2)))
    unweighed = dataclasses.replace(dense_routing(torch.zeros(2, 2)), weights_A=None)
    with pytest.raises(ValueError, match="one weight an expert"):
        mixture_log_probs(torch.zeros(4, 5), unweighed)


# --- cross-entropies


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_is_that_of_torch_for_logits_and_for_log_probabilities(label_smoothing):
    logits, labels = random(6, 4).float(), torch.tensor([0, 1, 2, 3, 3, 0])
    expected = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    torch.testing.assert_close(negative_log_likelihood(logits.log_softmax(-1), labels, label_smoothing), expected)
    torch.testing.assert_close(classification_losses(logits, labels, label_smoothing), expected)
    targets = smoothed_targets(labels, 4, label_smoothing)
    torch.testing.assert_close(-(targets * logits.log_softmax(-1)).sum(-1), expected)


def test_label_smoothing_by_hand():
    # Targets (0.9 + 0.05, 0.05) for smoothing 0.1 of two classes.
    loss = negative_log_likelihood(torch.tensor([[0.8, 0.2]]).log(), torch.tensor([0]), 0.1)
    assert float(loss) == pytest.approx(-(0.95 * math.log(0.8) + 0.05 * math.log(0.2)))
    assert smoothed_targets(torch.tensor([0]), 2, 0.1).tolist()[0] == pytest.approx([0.95, 0.05])


def test_half_precision_logits_are_widened_and_float64_is_kept():
    logits = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    loss = classification_losses(logits, torch.tensor([0]))
    assert loss.tolist() == pytest.approx([math.log(1 + math.e)], rel=1e-6)
    precise = classification_losses(torch.tensor([[0.0, 1e-12]], dtype=torch.float64), torch.tensor([0]))
    assert float(precise) - math.log(2) == pytest.approx(5e-13, rel=1e-2)  # log((1 + e^x) / 1) = log 2 + x / 2


# --- errors of real-valued outputs, one expert drawn


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor]:
    """Gate logits (T, E), experts' outputs (A, D), targets (T, D)."""
    return random(T, E).requires_grad_(), random(T * E, D, number=1).requires_grad_(), random(T, D, number=2)


def test_errors_take_outputs_of_any_shape():
    logits, outputs, targets = random(2, 3), random(6, 2, 4, number=1), random(2, 2, 4, number=2)
    one = dense_routing(logits)
    flat = squared_errors(outputs.view(6, 8), one, targets.view(2, 8))
    assert torch.equal(squared_errors(outputs, one, targets), flat)
    assert float(flat[1, 2]) == pytest.approx(float((targets[1] - outputs[5]).square().sum()))
    assert torch.equal(
        cooperative_error(outputs, one, targets), cooperative_error(outputs.view(6, 8), one, targets.view(2, 8))
    )


@pytest.mark.parametrize("k", [2, 3])
def test_errors_are_those_of_the_chosen_experts_in_the_routings_order(k):
    x, targets, networks = random(5, E), random(5, D, number=1), random(E, E, D, number=2)
    one = TopKGate(torch.nn.Identity(), E, k=k).route(x, context(5))
    rows, experts = one.row_ids_A.tolist(), one.expert_ids_A.tolist()
    outputs = torch.stack([x[row] @ networks[expert] for row, expert in zip(rows, experts, strict=True)])
    competitive = competitive_error(squared_errors(outputs, one, targets), log_weights(one))
    cooperative = cooperative_error(outputs, one, targets)
    for t in range(5):
        chosen = sorted(range(E), key=lambda e: -float(x[t, e]))[:k]
        weights = {e: math.exp(x[t, e]) / sum(math.exp(x[t, f]) for f in chosen) for e in chosen}
        errors = {e: float((targets[t] - x[t] @ networks[e]).square().sum()) for e in chosen}
        assert float(competitive[t]) == pytest.approx(sum(weights[e] * errors[e] for e in chosen))
        mixed = sum(weights[e] * (x[t] @ networks[e]) for e in chosen)
        assert float(cooperative[t]) == pytest.approx(float((targets[t] - mixed).square().sum()))


def test_the_sampled_gradient_is_that_of_the_competitive_error_on_average(case):
    logits, outputs, targets = case
    one = dense_routing(logits)
    errors, weights = squared_errors(outputs, one, targets), log_weights(one)

    def value_and_gradients(loss: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, (logits, outputs), retain_graph=True)]

    for t in range(T):
        averages = [torch.tensor(0.0), torch.zeros(T, E), torch.zeros(T * E, D)]
        for drawn in range(E):
            sampled = value_and_gradients(sampled_error(errors, weights, torch.full((T,), drawn))[t])
            assert float(sampled[0]) == pytest.approx(float(errors[t, drawn].detach()))
            probability = weights[t, drawn].detach().exp()
            averages = [total + probability * each for total, each in zip(averages, sampled, strict=True)]
        expected = value_and_gradients(competitive_error(errors, weights)[t])
        for average, each in zip(averages, expected, strict=True):
            torch.testing.assert_close(average, each, rtol=1e-12, atol=1e-14)


def test_only_the_drawn_expert_learns_from_a_draw(case):
    logits, outputs, targets = case
    one = dense_routing(logits)
    drawn = torch.tensor([2, 0, 1, 1])
    sampled_error(squared_errors(outputs, one, targets), log_weights(one), drawn).sum().backward()
    for t in range(T):
        for i in range(E):
            residual = targets[t] - outputs.detach()[t * E + i]
            expected = -2 * residual if i == drawn[t] else torch.zeros(D)
            assert outputs.grad[t * E + i].tolist() == pytest.approx(expected.tolist())


def test_a_draw_with_no_more_than_the_expected_error_does_not_move_the_gate():
    # Equal errors: whoever is drawn did neither better nor worse than expected.
    logits = random(1, 3).requires_grad_()
    sampled_error(torch.full((1, 3), 7.0), log_weights(dense_routing(logits)), torch.tensor([1])).backward()
    assert logits.grad.abs().max() < 1e-14


def test_experts_are_drawn_as_often_as_their_weights_say():
    weights = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    drawn = draw_assignments(weights.log().expand(20_000, 4), context(20_000))
    shares = [drawn.tolist().count(expert) / 20_000 for expert in range(4)]
    # Standard errors are at most sqrt(0.25 / 20000) = 0.0035.
    assert shares[:3] == pytest.approx([0.5, 0.3, 0.2], abs=0.012)
    assert shares[3] == 0.0
    first_is_excluded = draw_assignments(weights.flip(0).log().expand(20_000, 4), context(20_000))
    assert int(first_is_excluded.min()) == 1


def test_no_draw_ends_at_an_expert_of_weight_zero(monkeypatch):
    # 0, 1/2 and the largest number below 1 that there is, where weights do not quite sum to 1.
    draws = torch.tensor([0.0, 0.25, 0.75, 1 - 2.0**-24])
    monkeypatch.setattr("distmoe.noise.uniform", lambda key, *counters: draws)
    weights = torch.tensor([0.0, 0.5, 0.4999, 0.0]).log().expand(4, 4)
    assert draw_assignments(weights, context(4)).tolist() == [1, 1, 2, 2]


def test_a_draw_depends_on_the_sample_and_the_step_and_not_on_its_batch():
    weights = torch.full((64, 4), -math.log(4))
    drawn = draw_assignments(weights, context(64))
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    moved = dataclasses.replace(context(64), sample_ids=shuffled)
    assert torch.equal(draw_assignments(weights, moved), drawn[shuffled])
    for other in (context(64, step=1), context(64, seed=1), context(64).within("mixture")):
        agreeing = int((draw_assignments(weights, other) == drawn).sum())
        assert 4 <= agreeing <= 28  # 16 expected of 64, standard deviation 3.5
    by_position = draw_assignments(weights, dataclasses.replace(context(16), rows_per_sample=4))
    assert len(set(by_position.view(16, 4)[:, 0].tolist())) > 1
    assert (by_position.view(16, 4) != by_position.view(16, 4)[:, :1]).any()


# --- mixtures of class probabilities


def by_cases(name: str, gate: Tensor, scores: Tensor, labels: list[int], smoothing: float) -> list[float]:
    """The objectives of classifiers, by loops over cases, experts and classes."""
    values = []
    for t, label in enumerate(labels):
        num_experts, num_classes = gate.shape[1], scores.shape[1]
        odds = [math.exp(float(logit)) for logit in gate[t]]
        g = [each / sum(odds) for each in odds]
        target = [smoothing / num_classes + (1 - smoothing) * (c == label) for c in range(num_classes)]
        probs = []
        for e in range(num_experts):
            row = [math.exp(float(score)) for score in scores[t * num_experts + e]]
            probs.append([each / sum(row) for each in row])
        squared = [sum((d - p) ** 2 for d, p in zip(target, one, strict=True)) for one in probs]
        entropies = [-sum(d * math.log(p) for d, p in zip(target, one, strict=True)) for one in probs]
        mixed = [sum(g[e] * probs[e][c] for e in range(num_experts)) for c in range(num_classes)]
        values.append(
            {
                "cooperative": sum((d - p) ** 2 for d, p in zip(target, mixed, strict=True)),
                "competitive": sum(g[e] * squared[e] for e in range(num_experts)),
                "gaussian_mixture": -math.log(sum(g[e] * math.exp(-squared[e] / 2) for e in range(num_experts))),
                "root_likelihood": -math.log(sum(g[e] * math.exp(-entropies[e] / 2) for e in range(num_experts))),
            }[name]
        )
    return values


CLASS_ERRORS = ["cooperative", "competitive", "gaussian_mixture", "root_likelihood"]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", CLASS_ERRORS)
def test_class_objectives_equal_loops_over_cases(name, smoothing):
    gate, scores, labels = random(5, 3), random(15, 4, number=1), [0, 3, 1, 1, 2]
    objective = ClassObjective(name, scores.log_softmax(-1), dense_routing(gate), context(5))
    found = objective(torch.tensor(labels), smoothing)
    assert found.tolist() == pytest.approx(by_cases(name, gate, scores, labels, smoothing), rel=1e-12)


def test_the_root_likelihood_is_that_of_square_roots():
    # Odds 1 : 1; the experts give the label 1/4 and 1/9: -log((1/2 + 1/3) / 2).
    probs = torch.tensor([[1 / 4, 3 / 4], [1 / 9, 8 / 9]], dtype=torch.float64)
    one = dense_routing(torch.zeros(1, 2, dtype=torch.float64))
    loss = ClassObjective("root_likelihood", probs.log(), one, context(1))(torch.tensor([0]))
    assert float(loss) == pytest.approx(-math.log(5 / 12))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_sampled_class_objective_is_the_cross_entropy_of_the_expert_that_was_drawn(smoothing):
    gate, scores, labels = random(40, 3), random(120, 4, number=1), torch.arange(40) % 4
    one = dense_routing(gate)
    losses = ClassObjective("sampled", scores.log_softmax(-1), one, context(40))(labels, smoothing)
    drawn = draw_assignments(log_weights(one), context(40))
    assert set(drawn.tolist()) == {0, 1, 2}
    chosen = scores[torch.arange(40) * 3 + drawn]
    torch.testing.assert_close(
        losses, F.cross_entropy(chosen, labels, reduction="none", label_smoothing=smoothing), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", CLASS_ERRORS)
def test_gradients_of_class_objectives_are_those_of_finite_differences(name):
    gate, scores = random(3, 3).requires_grad_(), random(9, 4, number=1).requires_grad_()

    def of(gate: Tensor, scores: Tensor) -> Tensor:
        return ClassObjective(name, scores.log_softmax(-1), dense_routing(gate), context(3))(torch.tensor([0, 3, 1]))

    assert torch.autograd.gradcheck(of, (gate, scores))


def test_half_precision_log_probabilities_are_widened():
    scores = random(6, 4).bfloat16()
    one: Routing = dense_routing(random(2, 3).float())
    for name in (*CLASS_ERRORS, "sampled"):
        wide = ClassObjective(name, scores.float(), one, context(2))(torch.tensor([1, 2]), 0.1)
        narrow = ClassObjective(name, scores, one, context(2))(torch.tensor([1, 2]), 0.1)
        assert narrow.dtype == torch.float32, name
        assert torch.equal(narrow, wide), name
