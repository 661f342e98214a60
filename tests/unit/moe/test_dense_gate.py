import math

import pytest
import torch

from distmoe.moe.balance import RunningTotals
from distmoe.moe.gates.dense import DenseGate, UniformGate
from distmoe.moe.objectives import mixture_log_probs
from tests.unit.moe.gate_forms import Given, context, tokens, triples


def test_dense_assigns_all_experts_row_by_row_with_the_softmax():
    # Odds 1 : 3 and 1 : 1.
    routing = DenseGate(Given(), 2).route(torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0]]), context(2))
    rows, experts, weights = zip(*triples(routing), strict=True)
    assert (rows, experts) == ((0, 0, 1, 1), (0, 1, 0, 1))
    assert weights == pytest.approx((0.25, 0.75, 0.5, 0.5))


def test_evaluation_may_ask_the_most_probable_experts_only():
    logits = torch.tensor([[1.0, 5.0, 2.0, 2.0], [4.0, 1.0, 3.0, 2.0]]).log()
    gate = DenseGate(Given(), 4, k=2)
    routing = gate.route(logits, context(2, training=False))
    rows, experts, weights = zip(*triples(routing), strict=True)
    assert (rows, experts) == ((0, 0, 1, 1), (1, 2, 0, 2))
    assert weights == pytest.approx((5 / 7, 2 / 7, 4 / 7, 3 / 7))
    assert gate.experts_per_row == 2.0
    with pytest.raises(ValueError, match="k is for evaluation"):
        gate.route(logits, context(2))


def constrained(totals: list[float], margin: float, steps: int | None = None) -> DenseGate:
    gate = DenseGate(Given(), len(totals), margin=margin, constraint_steps=steps)
    assert isinstance(gate.balancer, RunningTotals)
    gate.balancer.totals_E += torch.tensor(totals, dtype=torch.float64)
    return gate


ODDS = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])


def test_experts_ahead_of_the_mean_by_more_than_the_margin_get_nothing_and_the_others_share_it():
    # The mean is 10. Expert 3 is 4 ahead, expert 1 exactly by the margin of 2, which is not more.
    gate = constrained([6.0, 12.0, 8.0, 14.0], margin=2.0)
    logits = ODDS.log().requires_grad_()
    routing = gate.route(logits, context(2))
    assert routing.weights_A.tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6, 0, 4 / 9, 3 / 9, 2 / 9, 0])
    # The gradient is that of the renormalised weights: d w_0 / d logit_j = w_0 ([j = 0] - w_j), none for expert 3.
    (gradient,) = torch.autograd.grad(routing.weights_A[0], logits)
    assert gradient[0].tolist() == pytest.approx([1 / 6 * 5 / 6, -1 / 6 * 2 / 6, -1 / 6 * 3 / 6, 0.0])
    assert gradient[1].tolist() == [0.0] * 4


def test_a_mixture_of_class_probabilities_leaves_out_whom_the_constraint_excludes():
    gate = constrained([6.0, 12.0, 8.0, 14.0], margin=2.0)
    logits = ODDS.log().requires_grad_()
    # Expert e is sure of class 0 with probability 0.1 * (e + 1).
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4]).repeat(2)
    log_probs_AC = torch.stack((shares, 1 - shares), dim=1).log().requires_grad_()
    mixed = mixture_log_probs(log_probs_AC, gate.route(logits, context(2)))
    # (1 * 0.1 + 2 * 0.2 + 3 * 0.3) / 6 and (4 * 0.1 + 3 * 0.2 + 2 * 0.3) / 9.
    assert mixed[:, 0].exp().tolist() == pytest.approx([1.4 / 6, 1.6 / 9])
    mixed[:, 0].sum().backward()
    assert logits.grad[:, 3].tolist() == [0.0, 0.0]
    assert log_probs_AC.grad.view(2, 4, 2)[:, 3].tolist() == [[0.0, 0.0]] * 2
    assert bool(logits.grad.isfinite().all())
    # d log mixture / d logit_e = w_e (p_e / mixture - 1).
    assert logits.grad[0, :3].tolist() == pytest.approx(
        [w / 6 * (p / (1.4 / 6) - 1) for w, p in ((1, 0.1), (2, 0.2), (3, 0.3))], abs=1e-6
    )


def test_the_constraint_holds_in_training_and_for_its_steps_only():
    free = [0.1, 0.2, 0.3, 0.4, 0.4, 0.3, 0.2, 0.1]
    gate = constrained([6.0, 12.0, 8.0, 14.0], margin=2.0, steps=5)
    assert gate.route(ODDS.log(), context(2, step=4)).weights_A[3] == 0.0
    for of in (context(2, step=5), context(2, step=4, training=False)):
        assert gate.route(ODDS.log(), of).weights_A.tolist() == pytest.approx(free)
    forever = constrained([6.0, 12.0, 8.0, 14.0], margin=2.0)
    assert forever.route(ODDS.log(), context(2, step=10**6)).weights_A[3] == 0.0


def test_running_totals_add_up_the_constrained_weights():
    gate = constrained([6.0, 12.0, 8.0, 14.0], margin=2.0)
    gate.balancer.update(gate.balancer.sums(gate.route(ODDS.log(), context(2))))
    # 1/6 + 4/9, 2/6 + 3/9, 3/6 + 2/9 and nothing.
    expected = [6 + 11 / 18, 12 + 12 / 18, 8 + 13 / 18, 14.0]
    assert gate.balancer.totals_E.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, r"k \(0\) must be between 1 and the number of experts \(4\)"),
        ({"k": 5}, r"k \(5\) must be between 1"),
        ({"margin": -1.0}, r"margin \(-1.0\) must be at least 0"),
        ({"margin": math.nan}, r"margin \(nan\) must be at least 0"),
        ({"constraint_steps": 3}, "constraint_steps needs a margin"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DenseGate(Given(), 4, **settings)


def test_uniform_is_the_plain_average():
    routing = UniformGate(4).route(tokens(2, 3), context(2))
    assert triples(routing) == [(row, expert, 0.25) for row in range(2) for expert in range(4)]
    assert routing.probs_TE.tolist() == [[0.25] * 4] * 2
