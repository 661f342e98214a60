"""Eigen's running totals and the loss-free bias, by hand; and what becomes of a mixture with and without them."""

import copy
import math

import pytest
import torch

from distmoe.contracts import Context
from distmoe.moe.balance import LossFreeBias, RunningTotals
from distmoe.moe.gates.dense import DenseGate
from distmoe.moe.gates.sigmoid import SigmoidGate
from distmoe.moe.objectives import competitive_error, gaussian_mixture_error, log_weights
from distmoe.moe.sums import Sums, add_sums
from tests.unit.moe.handmade import dense_routing, routing


def context(step: int = 0, training: bool = True, num_samples: int = 1) -> Context:
    return Context(0, step, torch.arange(num_samples), training)


def identity_gate(num_experts: int, **settings) -> DenseGate:
    """A gate whose logits are its tokens."""
    return DenseGate(torch.nn.Identity(), num_experts, **settings)


def total_of(gate: DenseGate, totals: list[float]) -> None:
    assert isinstance(gate.balancer, RunningTotals)
    gate.balancer.totals_E.copy_(torch.tensor(totals))


# --- Eigen's constraint


@pytest.mark.parametrize(
    ("totals", "excluded"),
    [
        ([0.0, 0.0, 0.0], [False, False, False]),
        ([2.0, 2.0, 2.0], [False, False, False]),
        ([4.0, 1.0, 1.0], [True, False, False]),  # 2 ahead of the mean 2
        ([3.5, 1.0, 0.0], [True, False, False]),  # 2 ahead of 1.5
        ([2.5, 1.0, 1.0], [False, False, False]),  # 1 ahead of 1.5: exactly the margin
        ([9.0, 8.0, 1.0], [True, True, False]),  # 3 and 2 ahead of 6
    ],
)
def test_who_is_ahead_by_more_than_the_margin_is_excluded(totals, excluded):
    gate = identity_gate(3, margin=1.0)
    total_of(gate, totals)
    assert gate.balancer.excluded(context()).tolist() == excluded


@pytest.mark.parametrize("total", [0.1, 0.7])
def test_of_equal_totals_nobody_is_ahead_however_the_mean_is_rounded(total):
    for num_experts in (3, 6):
        gate = identity_gate(num_experts, margin=0.0)
        gate.balancer.totals_E += total  # the mean of six 0.1, or of three 0.7, lies below each of them in float64
        assert gate.balancer.excluded(context()).tolist() == [False] * num_experts


def test_the_others_are_renormalised():
    gate = identity_gate(3, margin=1.0)
    total_of(gate, [4.0, 1.0, 1.0])
    odds = torch.tensor([[5.0, 1.0, 3.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
    one = gate.route(odds.log(), context())
    # Expert 0 is excluded: 1 : 3 and 1 : 1 are left.
    expected = [[0.0, 0.25, 0.75], [0.0, 0.5, 0.5]]
    for probs, weights, right in zip(one.probs_TE.tolist(), one.weights_A.view(2, 3).tolist(), expected, strict=True):
        assert probs == pytest.approx(right)
        assert weights == pytest.approx(right)


def test_the_constraint_holds_in_training_in_its_first_phase_only():
    gate = identity_gate(2, margin=0.5, constraint_steps=10)
    total_of(gate, [3.0, 1.0])
    x = torch.zeros(1, 2)
    free, constrained = [0.5, 0.5], [0.0, 1.0]
    assert gate.route(x, context(step=0)).probs_TE.tolist() == [constrained]
    assert gate.route(x, context(step=9)).probs_TE.tolist() == [constrained]
    assert gate.route(x, context(step=10)).probs_TE.tolist() == [free]
    assert gate.route(x, context(step=0, training=False)).probs_TE.tolist() == [free]
    forever = identity_gate(2, margin=0.5)
    total_of(forever, [3.0, 1.0])
    assert forever.route(x, context(step=10**6)).probs_TE.tolist() == [constrained]


def test_totals_are_of_constrained_weights_and_change_once_a_step():
    gate = identity_gate(2, margin=1.0)
    total_of(gate, [3.0, 0.5])
    first = gate.route(torch.tensor([[1.0, 3.0], [1.0, 1.0]]).log(), context())  # expert 0 has no weight
    sums: Sums = {}
    add_sums(sums, gate.balancer.sums(first))
    assert gate.balancer.totals_E.tolist() == [3.0, 0.5]
    add_sums(sums, gate.balancer.sums(first))
    gate.balancer.update(sums)
    assert gate.balancer.totals_E.tolist() == [3.0, 4.5]  # 2 micro-batches x 2 samples x weight 1
    then = gate.route(torch.tensor([[1.0, 3.0]]).log(), context())
    assert then.probs_TE.tolist()[0] == pytest.approx([0.25, 0.75])  # 0.75 ahead of 3.75 is inside the margin
    gate.balancer.update(gate.balancer.sums(then))
    assert gate.balancer.totals_E.tolist() == pytest.approx([3.25, 5.25])


def test_the_gradient_is_that_of_the_renormalised_weights():
    gate = identity_gate(3, margin=1.0)
    total_of(gate, [9.0, 0.0, 0.0])
    x = torch.tensor([[2.0, 1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    errors = torch.tensor([[0.3, 1.0, 4.0]], dtype=torch.float64)
    competitive_error(errors, log_weights(gate.route(x, context()))).sum().backward()
    # p_i (e_i - E) among experts 1 and 2, with E = p_1 * 1 + p_2 * 4.
    p = 1 / (1 + math.exp(-2))
    expected = p * 1 + (1 - p) * 4
    assert x.grad[0].tolist() == pytest.approx([0.0, p * (1 - expected), (1 - p) * (4 - expected)])


def test_totals_need_probabilities_and_take_no_gradient_along():
    logits = torch.zeros(2, 2, requires_grad=True)
    sums = RunningTotals(2, 1.0).sums(dense_routing(logits))
    assert (sums["weights_E"].tolist(), sums["weights_E"].requires_grad) == ([1.0, 1.0], False)
    assert sums["weights_E"].dtype == torch.float64  # in float32 a total of 2^24 samples would stop growing


def test_totals_are_saved_and_go_on_from_where_they_were():
    gate, other = identity_gate(3, margin=1.0), identity_gate(3, margin=1.0)
    total_of(gate, [4.0, 1.0, 1.0])
    other.load_state_dict(copy.deepcopy(gate.state_dict()))
    assert other.balancer.totals_E.tolist() == [4.0, 1.0, 1.0]
    assert other.balancer.excluded(context()).tolist() == [True, False, False]


class LineMixture:
    """Linear experts learn ``|x|``, for which it takes two of them. Expert 0 starts best, at the mean of ``|x|``."""

    def __init__(self, **settings) -> None:
        self.x = torch.linspace(-1, 1, 32).unsqueeze(1)
        self.slopes = (0.1 * torch.randn(4, generator=torch.Generator().manual_seed(0))).requires_grad_()
        self.offsets = torch.tensor([0.5, -1.0, -1.0, -1.0]).requires_grad_()
        self.gate = DenseGate(torch.nn.Linear(1, 4), 4, **settings)
        for parameter in self.gate.parameters():
            torch.nn.init.zeros_(parameter)
        self.optimizer = torch.optim.SGD([self.slopes, self.offsets, *self.gate.parameters()], lr=0.1)
        self.shares_E = torch.zeros(4)  # of the last step's weights
        self.error = 0.0  # mean over the last step
        self.leads: list[float] = []  # the largest total less the mean, after each step

    def train(self, num_steps: int) -> None:
        for step in range(num_steps):
            one = self.gate.route(self.x, context(step, num_samples=32))
            errors = (self.x.abs() - self.x * self.slopes - self.offsets).square()
            self.optimizer.zero_grad()
            gaussian_mixture_error(errors / 0.05, log_weights(one)).mean().backward()  # a variance of 0.05
            self.optimizer.step()
            self.shares_E = one.probs_TE.detach().mean(0)
            self.error = float((one.probs_TE * errors).detach().sum(-1).mean())
            if self.gate.balancer is not None:
                self.gate.balancer.update(self.gate.balancer.sums(one))
                totals_E = self.gate.balancer.totals_E
                self.leads.append(float(totals_E.max() - totals_E.mean()))


def test_the_first_good_expert_wins_everything_unless_it_is_held_back():
    free, balanced = LineMixture(), LineMixture(margin=8.0, constraint_steps=250)
    free.train(400)
    balanced.train(400)
    assert float(free.shares_E[0]) > 0.95
    assert float(balanced.shares_E.min()) > 0.05  # although the constraint was lifted 150 steps before
    assert balanced.error < 0.6 * free.error
    # While it holds, who is inside the margin gains at most one step on the mean: 32 samples * (1 - 1/4).
    assert 8.0 < max(balanced.leads[:250]) <= 8.0 + 24.0
    assert balanced.leads[-1] > 100.0


# --- loss-free bias


def test_a_bias_moves_by_the_rate_towards_an_even_load():
    bias = LossFreeBias(4, rate=0.01)
    bias.update({"load_E": torch.tensor([7.0, 1.0, 4.0, 4.0], dtype=torch.float64)})  # mean 4
    assert bias.bias_E.tolist() == pytest.approx([-0.01, 0.01, 0.0, 0.0])
    bias.update({"load_E": torch.tensor([5.0, 0.0, 4.0, 3.0], dtype=torch.float64)})  # mean 3
    assert bias.bias_E.tolist() == pytest.approx([-0.02, 0.02, -0.01, 0.0])


def test_an_even_load_of_any_size_keeps_the_biases():
    for num_experts in range(1, 40):
        bias = LossFreeBias(num_experts, rate=1.0)
        bias.update({"load_E": torch.full((num_experts,), 7.0, dtype=torch.float64)})
        assert not bias.bias_E.any()


def test_the_load_is_what_was_chosen_before_capacity():
    refused = routing([[0.9, 0.1]] * 3, [[0], [], []], wanted_E=torch.tensor([3, 0]))
    assert LossFreeBias(2, 0.1).sums(refused)["load_E"].tolist() == [3.0, 0.0]
    assert LossFreeBias(2, 0.1).sums(routing([[0.9, 0.1]] * 2, [[0], [1]]))["load_E"].tolist() == [1.0, 1.0]


def test_a_gate_that_prefers_one_expert_is_drawn_even():
    gate = SigmoidGate(torch.nn.Identity(), 3, k=1, bias_rate=0.01, renormalize=False)
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([2.0, 0.0, 0.0])
    loads = []
    for step in range(120):
        one = gate.route(x, context(step, num_samples=300))
        loads.append(one.rows_per_expert().tolist())
        gate.balancer.update(gate.balancer.sums(one))
    assert loads[0][0] > 230
    assert all(85 <= load <= 115 for loads_of_step in loads[-10:] for load in loads_of_step), loads[-10:]
