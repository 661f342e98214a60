"""What all gates promise, each checked in all its forms; what a single gate computes is in the file of its name."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from distmoe.contracts import Context
from distmoe.moe.gates import GATES, build_gate
from distmoe.moe.gates.base import Gate, token_counters
from distmoe.moe.layer import MoELayer
from distmoe.moe.routing import Routing
from tests.oracles import groups_of_rows, mlp_experts, sigmoid, softmax
from tests.unit.moe.gate_forms import (
    ALL_FORMS,
    FORMS,
    FORMS_ALONE,
    FORMS_WITH_NETWORK,
    HIDDEN,
    NUM_EXPERTS,
    SECTIONS,
    TRAINED_FORMS,
    WIDTH,
    Form,
    context,
    forms_that,
    pairs,
    tokens,
    triples,
)

SAMPLES, ROWS = 4, 3  # four samples of three tokens


def samples(form: Form, *ids: int, **other) -> Context:
    """The context in training where the form can be trained."""
    given_ids = torch.tensor(ids or range(SAMPLES))
    return Context(seed=0, step=0, sample_ids=given_ids, training=form.trained, **other)


def through(layer: MoELayer, x: torch.Tensor, of: Context) -> tuple[torch.Tensor, Routing]:
    with torch.no_grad():
        return layer(x, of)


def assert_same_bits(one: tuple[torch.Tensor, Routing], other: tuple[torch.Tensor, Routing]) -> None:
    assert torch.equal(one[0], other[0])
    for name in ("row_ids_A", "expert_ids_A", "weights_A", "logits_TE", "probs_TE", "load_TE"):
        left, right = getattr(one[1], name), getattr(other[1], name)
        assert (left is None and right is None) or torch.equal(left, right), name


def test_the_contract_is_checked_for_every_gate():
    assert {form.name for form in FORMS.values()} == GATES.keys()


@pytest.mark.parametrize("form", ALL_FORMS)
def test_assignments_are_in_range_and_no_row_goes_to_an_expert_twice(form):
    _, routing = through(form.layer(), tokens(SAMPLES, ROWS, WIDTH), samples(form))
    assert len(set(pairs(routing))) == len(pairs(routing)) > 0
    assert set(routing.row_ids_A.tolist()) <= set(range(routing.num_rows))
    assert set(routing.expert_ids_A.tolist()) <= set(range(NUM_EXPERTS))
    assert routing.rows_per_expert().tolist() == [routing.expert_ids_A.tolist().count(e) for e in range(NUM_EXPERTS)]
    assert routing.weights_A.shape == routing.row_ids_A.shape
    # An attentive gate asks all experts, also those that then weigh nothing.
    assert float(routing.weights_A.min()) > 0 or (form.name, form.trained) == ("attentive", False)
    assert routing.rows_per_sample == ROWS


@pytest.mark.parametrize("form", ALL_FORMS)
def test_probabilities_are_a_distribution_over_experts(form):
    _, routing = through(form.layer(), tokens(SAMPLES, ROWS, WIDTH), samples(form))
    assert routing.probs_TE.shape == (SAMPLES * ROWS, NUM_EXPERTS)
    assert float(routing.probs_TE.min()) >= 0
    torch.testing.assert_close(routing.probs_TE.sum(1), torch.ones(SAMPLES * ROWS), rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMS_WITH_NETWORK)
def test_probabilities_are_the_softmax_of_the_logits_or_the_share_of_the_sigmoids(form):
    _, routing = through(form.layer(), tokens(SAMPLES, ROWS, WIDTH), samples(form))
    for logits, probs in zip(routing.logits_TE.tolist(), routing.probs_TE.tolist(), strict=True):
        scores = [sigmoid(one) for one in logits]
        expected = [one / sum(scores) for one in scores] if form.name == "sigmoid" else softmax(logits)
        assert probs == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("form", forms_that(lambda form: form.name not in ("expert_choice", "soft")))
def test_a_token_has_as_many_experts_as_the_gate_says(form):
    layer = form.layer()
    if "capacity_factor" in form.settings:
        layer.gate.capacity_factor = None
    _, routing = through(layer, tokens(SAMPLES, ROWS, WIDTH), samples(form))
    rows = routing.row_ids_A.tolist()
    assert [rows.count(row) for row in range(SAMPLES * ROWS)] == [layer.gate.experts_per_row] * (SAMPLES * ROWS)
    assert routing.assignments_per_row == layer.gate.experts_per_row


@pytest.mark.parametrize("form", FORMS_ALONE)
def test_permuted_samples_give_permuted_outputs_noise_included(form):
    layer, x, order = form.layer(), tokens(SAMPLES, ROWS, WIDTH), [2, 0, 3, 1]
    y, _ = through(layer, x, samples(form))
    permuted, _ = through(layer, x[order], samples(form, *order))
    # The same arithmetic in another place of a matrix product.
    torch.testing.assert_close(permuted, y[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS_ALONE)
def test_a_sample_gets_the_same_alone_as_among_others(form):
    layer, x = form.layer(), tokens(SAMPLES, ROWS, WIDTH)
    y, _ = through(layer, x, samples(form))
    for sample in range(SAMPLES):
        alone, _ = through(layer, x[sample : sample + 1], samples(form, sample))
        torch.testing.assert_close(alone[0], y[sample], rtol=1e-5, atol=1e-6)


EQUIVARIANT = {name: form for name, form in FORMS.items() if form.name != "hash"} | {
    "prioritised-batch": Form("topk", {"k": 2, "capacity_factor": 0.7, "group": "batch", "priority": "score"})
}
for _served_as_they_come in ("topk-capacity", "topk-batch", "switch-capacity"):
    del EQUIVARIANT[_served_as_they_come]


@given(
    name=st.sampled_from(sorted(EQUIVARIANT)),
    num_samples=st.integers(1, 5),
    rows=st.integers(1, 6),
    seed=st.integers(0, 99),
    data=st.data(),
)
@settings(deadline=None, max_examples=150, derandomize=True)
def test_permuted_tokens_of_a_group_are_routed_as_before(name, num_samples, rows, seed, data):
    form = EQUIVARIANT[name]
    layer = form.layer(seed=seed).double()
    x = tokens(num_samples, rows, WIDTH, seed=seed, dtype=torch.float64)
    num_rows = num_samples * rows
    group = form.settings.get("group", "image")
    group_rows = num_rows if group == "batch" else rows * (1 if group == "image" else group)
    order = [row for some in groups_of_rows(num_rows, group_rows) for row in data.draw(st.permutations(some))]
    of = context(num_samples, training=False)  # without noise, which belongs to a position
    y, routing = through(layer, x, of)
    permuted, again = through(layer, x.flatten(0, 1)[order].view_as(x), of)
    torch.testing.assert_close(permuted.flatten(0, 1), y.flatten(0, 1)[order], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(again.probs_TE, routing.probs_TE[order], rtol=1e-9, atol=1e-11)
    if routing.mixing is None:
        before = {(row, expert): weight for row, expert, weight in triples(routing)}
        after = {(order[row], expert): weight for row, expert, weight in triples(again)}
        assert after == pytest.approx(before, rel=1e-9)
        return
    for one in ("into_GNS", "out_of_GNS"):  # Slots stay what they were; the tokens' places in them move.
        weights, moved = (mixed.mixing.groups.unfold(getattr(mixed.mixing, one)) for mixed in (routing, again))
        torch.testing.assert_close(moved, weights[order], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", forms_that(lambda form: not form.alone))
def test_a_group_of_several_samples_couples_them(form):
    layer, x = form.layer(), tokens(SAMPLES, ROWS, WIDTH)
    y, _ = through(layer, x, samples(form))
    alone = [through(layer, x[i : i + 1], samples(form, i))[0][0] for i in range(SAMPLES)]
    assert not torch.allclose(torch.stack(alone), y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ALL_FORMS)
def test_no_sample_gives_no_assignment_and_gradients_of_zero(form):
    layer = form.layer()
    x = torch.zeros(0, ROWS, WIDTH, requires_grad=True)
    y, routing = layer(x, replace(samples(form), sample_ids=torch.zeros(0, dtype=torch.long)))
    assert (y.shape, routing.num_rows, pairs(routing), routing.num_dropped) == (x.shape, 0, [], 0)
    assert routing.demand_per_expert().tolist() == [0] * NUM_EXPERTS
    y.sum().backward()
    experts = layer.experts.parameters()
    assert [float(parameter.grad.abs().sum()) for parameter in experts] == [0.0] * 4


@pytest.mark.parametrize("form", ALL_FORMS)
def test_one_token_is_routed_like_any_other(form):
    layer, x = form.layer(), tokens(SAMPLES, 1, WIDTH)
    y, _ = through(layer, x, samples(form))
    alone, routing = through(layer, x[1:2], samples(form, 1))
    if form.alone:
        torch.testing.assert_close(alone[0], y[1], rtol=1e-5, atol=1e-6)
    # The only token of its group is always served: a capacity is at least 1.
    assert set(routing.row_ids_A.tolist()) == set(range(routing.num_rows))


@pytest.mark.parametrize("form", ALL_FORMS)
def test_the_layout_of_the_input_in_memory_does_not_matter(form):
    layer = form.layer()
    x = tokens(SAMPLES, ROWS, WIDTH)
    strided = tokens(WIDTH, ROWS, SAMPLES, 2)
    strided[..., 0] = x.permute(2, 1, 0)
    strided = strided[..., 0].permute(2, 1, 0)
    assert not strided.is_contiguous()
    assert_same_bits(through(layer, strided, samples(form)), through(layer, x, samples(form)))


@torch.no_grad()
def routed(gate: Gate, x: torch.Tensor, of: Context) -> Routing:
    """Of the gate alone, which asks for hidden states where it needs them."""
    routing = gate.route(x.flatten(0, 1), replace(of, rows_per_sample=ROWS))
    answers = tokens(SAMPLES * ROWS * NUM_EXPERTS, HIDDEN).to(x.dtype)
    return gate.weigh(routing, answers) if gate.needs_hidden else routing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ALL_FORMS)
def test_the_gate_works_in_float32_on_half_precision_tokens(form, dtype):
    gate, half = form.layer().gate, tokens(SAMPLES, ROWS, WIDTH).to(dtype)
    routing = routed(gate, half, samples(form))
    assert routing.weights_A.dtype == routing.probs_TE.dtype == torch.float32
    if not gate.needs_hidden:
        assert_same_bits((half, routing), (half, routed(gate, half.float(), samples(form))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ALL_FORMS)
def test_a_layer_in_half_precision_runs_with_the_float32_gate_it_had(form, dtype):
    layer, half = form.layer(), tokens(SAMPLES, ROWS, WIDTH).to(dtype)
    gate = copy.deepcopy(layer.gate)
    layer = layer.half() if dtype == torch.float16 else layer.to(dtype)
    kept = [*layer.gate.parameters(), *layer.gate.buffers()]
    assert {one.dtype for one in kept} <= {torch.float32}
    assert {one.dtype for one in layer.experts.parameters()} == {dtype}
    assert_same_bits((half, routed(layer.gate, half, samples(form))), (half, routed(gate, half, samples(form))))
    x = half.clone().requires_grad_()
    y, _ = layer(x, samples(form))
    (y.float() * tokens(SAMPLES, ROWS, WIDTH, seed=2)).sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    gradients = [one.grad for one in layer.parameters()]
    assert all(bool(one.isfinite().all()) for one in [y, x.grad, *gradients])
    exact, _ = through(form.layer(), half.float(), samples(form))
    # bfloat16 keeps 8 bits: the experts' weights, and their products of a few terms of size about 1, are off by it.
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)


def test_a_gate_moves_and_changes_between_the_wide_types_as_any_module():
    layer = FORMS["dense-constrained"].layer()
    weights = layer.gate.network.weight.detach().clone()
    layer.double().to(torch.bfloat16)  # a gate of another type than its tokens could not run
    assert layer.gate.network.weight.dtype == layer.gate.balancer.totals_E.dtype == torch.float32
    assert torch.equal(layer.gate.network.weight, weights)
    assert layer.double().gate.network.weight.dtype == torch.float64
    assert layer.half().to("meta").gate.network.weight.device.type == "meta"


@pytest.mark.parametrize("form", ALL_FORMS)
def test_tokens_are_kept_in_training_only(form):
    layer, x = form.layer(), tokens(SAMPLES, ROWS, WIDTH)
    if form.trained:
        _, routing = layer(x.requires_grad_(), samples(form))
        assert torch.equal(routing.tokens_T, x.detach().flatten(0, 1))
        assert not routing.tokens_T.requires_grad
    _, routing = layer(x, replace(samples(form), training=False))
    assert routing.tokens_T is None


@pytest.mark.parametrize("form", ALL_FORMS)
def test_autocast_does_not_reach_the_gate(form):
    layer, x = form.layer(), tokens(SAMPLES, ROWS, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = routed(layer.gate, x, samples(form))
        y, _ = through(layer, x, samples(form))
    assert_same_bits((x, routing), (x, routed(layer.gate, x, samples(form))))
    # bfloat16 keeps 8 bits: the experts' products of a few terms of size about 1 are off by a few times 2^-8.
    torch.testing.assert_close(y, through(layer, x, samples(form))[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("form", ALL_FORMS)
def test_a_float64_gate_computes_in_float64(form):
    layer, x = form.layer(), tokens(SAMPLES, ROWS, WIDTH, dtype=torch.float64)
    y, routing = through(layer.double(), x, samples(form))
    assert routing.weights_A.dtype == routing.probs_TE.dtype == torch.float64
    rounded, _ = through(layer.float(), x.float(), samples(form))
    # Equal to float32 rounding, and not to less: the double-precision result did not pass through float32.
    torch.testing.assert_close(y, rounded.double(), rtol=1e-4, atol=1e-5)
    assert not torch.equal(y, y.float().double())


@pytest.mark.parametrize("form", ALL_FORMS)
def test_evaluation_has_the_same_bits_for_every_seed_and_step_and_leaves_torchs_generator_alone(form):
    layer, x = form.layer(), tokens(SAMPLES, ROWS, WIDTH)
    of = replace(samples(form), training=False)
    state = torch.get_rng_state()
    first = through(layer, x, of)
    assert_same_bits(through(layer, x, replace(of, seed=7, step=3)), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("form", TRAINED_FORMS)
def test_noise_is_keyed_by_seed_step_and_path_in_the_gates_that_draw_and_leaves_torchs_generator_alone(form):
    layer, x = form.layer(), tokens(SAMPLES, ROWS, WIDTH)
    state = torch.get_rng_state()
    first, routing = through(layer, x, samples(form))
    assert_same_bits(through(layer, x, samples(form)), (first, routing))
    others = [replace(samples(form), **change) for change in ({"seed": 1}, {"step": 1}, {"path": "block.2"})]
    same = [torch.equal(through(layer, x, other)[0], first) for other in others]
    draws = form.name == "noisy_topk" or form.settings.get("jitter", 0.01 if form.name == "switch" else 0.0) > 0
    # A hash depends on the layer alone.
    assert same == ([False] * 3 if draws else [True, True, form.name != "hash"])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("form", TRAINED_FORMS)
def test_every_parameter_of_the_gate_has_a_gradient(form):
    layer = form.layer()
    y, _ = layer(tokens(SAMPLES, ROWS, WIDTH), samples(form))
    (y * tokens(SAMPLES, ROWS, WIDTH, seed=2)).sum().backward()
    learnt = {name: float(parameter.grad.abs().max()) for name, parameter in layer.gate.named_parameters()}
    assert {name for name, size in learnt.items() if size < 1e-4} == set()
    assert bool(learnt) == (form.name not in ("hash", "uniform"))


@pytest.mark.parametrize("form", FORMS_WITH_NETWORK)
def test_a_network_of_another_width_is_refused(form):
    gate = form.gate()
    gate.network = nn.Linear(WIDTH, 7)
    with pytest.raises(ValueError, match=rf"gives \(12, 7\), not \(12, {gate.num_outputs}\)"):
        gate.route(tokens(12, WIDTH), context(12, training=form.trained))


SINGLE = {"topk": {"k": 1}, "noisy_topk": {"k": 1}, "cosine": {"k": 1}, "sigmoid": {"k": 1, "scale": 2.0}}


@pytest.mark.parametrize("name", sorted(GATES))
def test_a_single_expert_does_all_the_work(name):
    # Evaluation: with k=1 and renormalised weights there is nothing to train.
    form = Form(name, SINGLE.get(name, {"capacity_factor": 1.0} if name == "expert_choice" else {}), trained=False)
    layer, x = form.layer(num_experts=1), tokens(SAMPLES, ROWS, WIDTH)
    y, routing = through(layer, x, samples(form))
    assert set(routing.expert_ids_A.tolist()) == {0}
    seen = x
    if name == "soft":  # one slot an image, which all its tokens get
        weights = routing.logits_TE.view(SAMPLES, ROWS, 1).softmax(1)
        seen = (weights * x).sum(1, keepdim=True).expand_as(x)
    expert = mlp_experts(layer.experts.w1, layer.experts.b1, layer.experts.w2, layer.experts.b2, F.gelu)[0]
    torch.testing.assert_close(y, (2.0 if name == "sigmoid" else 1.0) * expert(seen), rtol=1e-5, atol=1e-6)


@given(
    name=st.sampled_from(sorted(FORMS)),
    num_samples=st.integers(0, 5),
    rows=st.integers(1, 6),
    num_experts=st.integers(NUM_EXPERTS, 9),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_any_shape_gives_finite_outputs_and_demands_that_add_up(name, num_samples, rows, num_experts, seed):
    form = FORMS[name]
    layer = form.layer(num_experts, seed=seed)
    x = tokens(num_samples, rows, WIDTH, seed=seed)
    y, routing = through(layer, x, replace(samples(form), sample_ids=torch.arange(num_samples)))
    assert y.shape == x.shape
    assert bool(y.isfinite().all())
    assert len(set(pairs(routing))) == len(pairs(routing))
    wanted, got = routing.demand_per_expert(), routing.rows_per_expert()
    assert bool((wanted >= got).all())
    assert routing.num_dropped == int((wanted - got).sum())
    if routing.wanted_E is not None:
        assert int(wanted.sum()) == num_samples * rows * layer.gate.experts_per_row


def test_counters_are_the_sample_and_the_position_in_it():
    ids, positions = token_counters(Context(0, 0, torch.tensor([7, 3]), True, rows_per_sample=3), torch.device("cpu"))
    assert ids.tolist() == [7, 7, 7, 3, 3, 3]
    assert positions.tolist() == [0, 1, 2, 0, 1, 2]
    # Ids that a loader has left on another device than the tokens come along.
    ids, positions = token_counters(Context(0, 0, torch.tensor([7, 3]), True), torch.device("meta"))
    assert (ids.device.type, positions.device.type) == ("meta", "meta")


@pytest.mark.parametrize("form", ALL_FORMS)
def test_gates_are_built_as_their_section_says(form):
    section = SECTIONS.validate_python({"name": form.name, **form.settings})
    gate = build_gate(section, NUM_EXPERTS, lambda num_outputs: nn.Linear(WIDTH, num_outputs), hidden=6)
    assert type(gate) is GATES[form.name]
    assert gate.num_experts == NUM_EXPERTS
    for name, value in section.model_dump(exclude={"name", "network"}).items():
        if name in ("bias_rate", "margin"):
            assert value is None or value in vars(gate.balancer).values()
        elif name == "temperature":
            assert gate.head.temperature == value
        elif name != "constraint_steps" and not (form.name == "dense" and name == "k"):
            assert getattr(gate, name) == value, name
    if form.name not in ("hash", "uniform"):
        assert gate.network.out_features == gate.num_outputs
        assert gate.network in set(gate.modules())  # a network given after construction is a part like any other
