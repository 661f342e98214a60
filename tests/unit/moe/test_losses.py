import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distmoe.config import LossWeights, MoESection
from distmoe.contracts import Context
from distmoe.moe.gates.noisy import NoisyTopKGate
from distmoe.moe.losses import LOSSES, AdditiveLoss, auxiliary_losses, build_losses
from distmoe.moe.routing import Routing
from distmoe.moe.sums import Sums, add_sums
from tests.unit.moe.handmade import on_every_rank, routing

SECTION = MoESection()
ADDITIVE = sorted(name for name, build in LOSSES.items() if isinstance(build(SECTION), AdditiveLoss))


def value(name: str, one: Routing) -> float:
    return float(LOSSES[name](SECTION).value(one, torch.zeros(one.num_rows, 2)))


EVEN = [[0.25] * 4] * 8
COLLAPSED = [[1.0, 0.0, 0.0, 0.0]] * 8


def test_at_balance():
    spread = routing(EVEN, [[row % 4] for row in range(8)], load_TE=torch.tensor(EVEN))
    # f_e = P_e = 1/4: 4 * 4 * 1/16.
    assert value("load_balance", spread) == pytest.approx(1.0)
    assert value("importance", spread) == 0.0
    assert value("load", spread) == 0.0


def test_at_collapse():
    collapsed = routing(COLLAPSED, [[0]] * 8, load_TE=torch.tensor(COLLAPSED))
    # f = P = (1, 0, 0, 0): 4 * 1.
    assert value("load_balance", collapsed) == pytest.approx(4.0)
    # I = (8, 0, 0, 0), mean 2, unbiased variance (36 + 3 * 4) / 3 = 16: 16 / 4.
    assert value("importance", collapsed) == pytest.approx(4.0)
    assert value("load", collapsed) == pytest.approx(4.0)


def test_load_balance_counts_assignments_and_averages_probabilities():
    # P = (0.675, 0.325), f = (1, 0): 2 * 0.675.
    assert value("load_balance", routing([[0.75, 0.25], [0.6, 0.4]], [[0], [0]])) == pytest.approx(1.35)
    # Three experts, two choices a row: f = (2, 1, 1) / 4, P = (0.4, 0.35, 0.25):
    # 3 * (0.5 * 0.4 + 0.25 * 0.35 + 0.25 * 0.25) = 3 * 0.35.
    two_choices = routing([[0.5, 0.3, 0.2], [0.3, 0.4, 0.3]], [[0, 1], [0, 2]])
    assert value("load_balance", two_choices) == pytest.approx(1.05)


def test_load_balance_counts_what_was_wanted_before_capacity():
    # Both rows wanted expert 0, one was refused: f = (1, 0) all the same, and not (1, 0) of one row.
    refused = routing([[0.75, 0.25], [0.5, 0.5], [0.4, 0.6]], [[0], [], [1]], wanted_E=torch.tensor([2, 1]))
    # f = (2, 1) / 3, P = (0.55, 0.45): 2 * (1.1 + 0.45) / 3.
    assert value("load_balance", refused) == pytest.approx(2 * 1.55 / 3)


def test_load_balance_has_a_gradient_through_the_probabilities():
    logits = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.2, 0.1]], dtype=torch.float64, requires_grad=True)
    one = routing(logits.softmax(-1), [[0], [0]], logits)
    LOSSES["load_balance"](SECTION).value(one).backward()
    # d/dP_te = E * f_e / T = 3 * (1, 0, 0) / 2, so d/dlogit_te = 1.5 * p_0 * (delta_e0 - p_e).
    p = logits.detach().softmax(-1)
    expected = 1.5 * p[:, :1] * (torch.tensor([1.0, 0.0, 0.0]) - p)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-12)


def test_importance_and_load_use_the_unbiased_variance():
    # I = (3, 1), mean 2, unbiased variance (1 + 1) / 1 = 2: 2 / 4. The biased one would give 0.25.
    probs = [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]]
    one = routing(EVEN[:4], [[0]] * 4, load_TE=torch.tensor(probs))
    assert value("load", one) == pytest.approx(0.5)
    assert value("importance", routing(probs, [[0]] * 4)) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["importance", "load"])
def test_one_expert_varies_by_nothing_and_has_a_gradient_of_zero(name):
    probs = torch.ones(3, 1, requires_grad=True)
    loss = LOSSES[name](SECTION).value(routing(probs, [[0]] * 3, load_TE=probs))
    loss.backward()
    assert (float(loss.detach()), probs.grad.tolist()) == (0.0, [[0.0]] * 3)


def test_a_gate_without_an_estimate_of_its_load_has_no_load_loss():
    assert value("load", routing(COLLAPSED, [[0]] * 8)) == 0.0


def test_the_load_of_a_noisy_gate_by_the_formula():
    # Shazeer's appendix A with sigma = 0.5 for all: P(x, e) = Phi((logit_e - kth largest of the other H) / sigma).
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    network = torch.nn.Linear(3, 4, bias=False, dtype=torch.float64)
    network.weight = torch.nn.Parameter(weight.detach())
    routed = NoisyTopKGate(network, 4, k=2, noise_std=0.5).route(x, Context(0, 0, torch.arange(6), training=True))
    noisy = routed.logits_TE.detach()
    loads = [0.0] * 4
    for row in range(6):
        for expert in range(4):
            others = sorted((float(noisy[row, other]) for other in range(4) if other != expert), reverse=True)
            clean = float(x[row] @ weight[expert].detach())
            loads[expert] += 0.5 * (1 + math.erf((clean - others[1]) / 0.5 / math.sqrt(2)))
    mean = sum(loads) / 4
    expected = sum((load - mean) ** 2 for load in loads) / 3 / mean**2
    loss = LOSSES["load"](SECTION).value(routed)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-9)
    loss.backward()
    assert network.weight.grad.abs().amin() > 0  # every logit moves it, of experts nobody chose as well


def test_z_is_the_mean_squared_log_sum_exp():
    # log(1 + 1 + 1 + 1) = log 4; log(2 + 3) = log 5 among two experts.
    assert value("z", routing(EVEN, [[0]] * 8, torch.zeros(8, 4))) == pytest.approx(math.log(4) ** 2)
    logits = torch.tensor([[2.0, 3.0], [1.0, 1.0]]).log()
    expected = (math.log(5) ** 2 + math.log(2) ** 2) / 2
    assert value("z", routing(logits.softmax(-1), [[0], [0]], logits)) == pytest.approx(expected)
    # Shifting all logits changes z but no probability: at log 4 + 1, say.
    assert value("z", routing(EVEN, [[0]] * 8, torch.ones(8, 4))) == pytest.approx((math.log(4) + 1) ** 2)


def by_rows(name: str, one: Routing) -> float:
    """The additive losses by Python loops over rows, filters and experts."""
    experts = range(one.num_experts)
    probs = one.probs_TE.flatten(0, -2).tolist()
    if name == "z":
        rows = one.logits_TE.flatten(0, -2).tolist()
        return sum(math.log(sum(math.exp(logit) for logit in row)) ** 2 for row in rows) / len(rows)
    totals = [sum(row[e] for row in (one.load_TE.tolist() if name == "load" else probs)) for e in experts]
    if name == "load_balance":
        counts = [one.expert_ids_A.tolist().count(e) for e in experts]
        return sum(len(totals) * counts[e] / sum(counts) * totals[e] / len(probs) for e in experts)
    mean = sum(totals) / len(totals)
    return sum((total - mean) ** 2 for total in totals) / max(len(totals) - 1, 1) / mean**2


@st.composite
def random_routings(draw) -> Routing:
    """Random scores, one or several distributions a row."""
    num_rows, num_experts, filters = draw(st.integers(2, 8)), draw(st.integers(1, 5)), draw(st.sampled_from([(), (3,)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    logits = torch.randn(num_rows, *filters, num_experts, generator=generator, dtype=torch.float64)
    experts = torch.randint(0, num_experts, (num_rows, 2), generator=generator).tolist()
    load = torch.rand(num_rows, num_experts, generator=generator, dtype=torch.float64)
    return routing(logits.softmax(-1), experts, logits, load_TE=load)


def some_rows(one: Routing, rows: slice) -> Routing:
    chosen = torch.isin(one.row_ids_A, torch.arange(one.num_rows)[rows])
    return dataclasses.replace(
        one,
        num_rows=len(one.probs_TE[rows]),
        row_ids_A=one.row_ids_A[chosen] - (rows.start or 0),
        expert_ids_A=one.expert_ids_A[chosen],
        weights_A=one.weights_A[chosen],
        logits_TE=one.logits_TE[rows],
        probs_TE=one.probs_TE[rows],
        load_TE=one.load_TE[rows],
    )


@pytest.mark.parametrize("name", ADDITIVE)
@given(one=random_routings())
@settings(deadline=None, max_examples=15, derandomize=True)
def test_losses_equal_loops_over_rows(name, one):
    assert value(name, one) == pytest.approx(by_rows(name, one), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", ADDITIVE)
@given(one=random_routings(), data=st.data())
@settings(deadline=None, max_examples=15, derandomize=True)
def test_sums_add_up_over_any_split_of_the_tokens(name, one, data):
    cut = data.draw(st.integers(0, one.num_rows))
    loss = LOSSES[name](SECTION)
    sums: Sums = {}
    for rows in (slice(0, cut), slice(cut, one.num_rows)):
        add_sums(sums, loss.sums(some_rows(one, rows)))
    assert float(loss.loss(sums)) == pytest.approx(value(name, one), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", sorted(LOSSES))
@given(one=random_routings(), data=st.data())
@settings(deadline=None, max_examples=10, derandomize=True)
def test_every_rank_computes_the_loss_of_the_whole_batch(name, one, data):
    first, second = sorted((data.draw(st.integers(0, one.num_rows)), data.draw(st.integers(0, one.num_rows))))
    samples = torch.arange(2.0 * one.num_rows).view(-1, 2).square()
    parts = [slice(0, first), slice(first, second), slice(second, one.num_rows)]  # some of them may be empty
    loss = LOSSES[name](SECTION)
    values = on_every_rank(
        lambda rank, reduce: loss.value(some_rows(one, parts[rank]), samples[parts[rank]], reduce), 3
    )
    expected = float(loss.value(one, samples))
    assert [float(each) for each in values] == pytest.approx([expected] * 3, rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradients_are_those_of_finite_differences(name):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    samples = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    loss = LOSSES[name](SECTION)

    def of(logits: torch.Tensor) -> torch.Tensor:
        probs = logits.softmax(-1)
        return loss.value(routing(probs, [[0], [1], [2], [0], [0]], logits, load_TE=probs.square()), samples)

    assert torch.autograd.gradcheck(of, (logits,))
    assert torch.autograd.grad(of(logits), logits)[0].abs().amin() > 0


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_no_row_costs_nothing_and_has_a_gradient(name):
    logits = torch.zeros(0, 4, requires_grad=True)
    probs = logits.softmax(-1)
    loss = LOSSES[name](SECTION).value(routing(probs, [], logits, load_TE=probs), torch.zeros(0, 2))
    loss.backward()
    assert (float(loss.detach()), logits.grad.shape) == (0.0, (0, 4))


def test_a_constraint_that_excludes_an_expert_leaves_losses_and_gradients_finite():
    logits = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, 0.0]], requires_grad=True)
    for name in sorted(LOSSES):
        masked = logits.masked_fill(torch.tensor([False, True, False]), -torch.inf)
        one = routing(masked.softmax(-1), [[0, 1, 2]] * 2, masked, load_TE=masked.softmax(-1))
        loss = LOSSES[name](SECTION).value(one, torch.tensor([[0.0], [1.0]]))
        gradient = torch.autograd.grad(loss, logits)[0]
        assert math.isfinite(float(loss.detach())), name
        assert torch.isfinite(gradient).all(), name


def test_auxiliary_losses_are_averaged_over_layers_and_unweighted():
    layers = {
        "first": routing(EVEN, [[row % 4] for row in range(8)]),
        "second": routing(COLLAPSED, [[0]] * 8),
    }
    losses = build_losses(MoESection(loss_weights=LossWeights(load_balance=0.01, importance=2.0)))
    values = auxiliary_losses(layers, losses)
    # (1 + 4) / 2 and (0 + 4) / 2, whatever the weights.
    assert {name: float(loss) for name, loss in values.items()} == pytest.approx(
        {"load_balance": 2.5, "importance": 2.0}
    )
    assert auxiliary_losses({}, losses) == {}


def test_losses_are_built_where_they_have_a_weight_and_as_the_section_says():
    assert build_losses(SECTION) == {}
    weights = {"z": 1e-30, "similarity_within": 0.5}
    built = build_losses(MoESection(loss_weights=LossWeights(**weights)))
    assert set(built) == {"z", "similarity_within"}
    every = MoESection.model_validate(
        {
            "loss_weights": {"similarity_within": 1.0, "similarity_between": 1.0},
            "similarity": {"form": "authors", "distance": "tokens"},
        }
    )
    described = {name: (loss.pairs, loss.form, loss.distance) for name, loss in build_losses(every).items()}
    assert described == {
        "similarity_within": ("within", "authors", "tokens"),
        "similarity_between": ("between", "authors", "tokens"),
    }


def test_auxiliary_losses_go_through_the_reducer_together():
    seen = []

    class Doubled:
        def __call__(self, sums):
            seen.append(sorted(sums))
            return {name: tensor * 2 for name, tensor in sums.items()}

    one = routing([[0.9, 0.1]], [[0]], torch.zeros(1, 2))
    losses = {name: LOSSES[name](SECTION) for name in ("z", "importance")}
    sums = {"z": ("rows", "squares"), "importance": ("probs_E",)}
    # Twice the squares over twice the rows: as before. It is not the loss that is reduced.
    values = auxiliary_losses({"a": one, "b": one}, losses, reducer=Doubled())
    assert float(values["z"]) == pytest.approx(math.log(2) ** 2)
    assert float(values["importance"]) == pytest.approx(2 * (0.9 - 0.5) ** 2 / 0.5**2)
    names = [f"{name} {layer} {key}" for name, keys in sums.items() for layer in "ab" for key in keys]
    assert seen == [sorted(names)]


@pytest.mark.parametrize(
    ("name", "missing"),
    [(name, "logits_TE" if name == "z" else "probs_TE") for name in sorted(LOSSES)],
)
def test_a_gate_without_scores_is_refused(name, missing):
    bare = dataclasses.replace(routing(EVEN, [[0]] * 8), **{missing: None})
    with pytest.raises(ValueError, match=r"needs? a gate with"):
        value(name, bare)


@pytest.mark.parametrize("k", [1, 2])
def test_load_balance_and_z_are_those_of_transformers(k):
    pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
    from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

    logits = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    one = routing(logits.softmax(-1), logits.topk(k).indices.tolist(), logits)
    # Theirs counts each of the k choices in full: k times the share of assignments.
    theirs = float(load_balancing_loss_func((logits,), 4, k)) / k
    assert value("load_balance", one) == pytest.approx(theirs, rel=1e-5)
    assert value("z", one) == pytest.approx(float(router_z_loss_func(logits.unsqueeze(0))), rel=1e-5)
