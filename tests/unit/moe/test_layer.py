from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from distmoe.config import CNNNetwork, CosineNetwork, LinearNetwork, MLPNetwork
from distmoe.contracts import Context
from distmoe.moe.dispatch import LocalDispatcher, Placement
from distmoe.moe.experts import MLPExperts, ModuleExperts
from distmoe.moe.gates import GATES, build_gate
from distmoe.moe.gates.dense import DenseGate
from distmoe.moe.gates.topk import TopKGate
from distmoe.moe.layer import MoELayer
from distmoe.moe.networks import PooledCNN, network_factory
from tests.oracles import mixture_output, mlp_experts, top_k_choices
from tests.threads import assert_equal_bits_on_two_threads
from tests.unit.moe.gate_forms import (
    FORMS,
    HIDDEN,
    SECTIONS,
    TRAINED_FORMS,
    WIDTH,
    Form,
    Given,
    context,
    forms_that,
    tokens,
)

ROUTED_FORMS = [name for name, form in FORMS.items() if form.name != "soft"]  # whose loop is in the file of that gate


def functions_of(experts: MLPExperts) -> list:
    return mlp_experts(experts.w1, experts.b1, experts.w2, experts.b2, F.gelu)


def by_the_loop(moe: MoELayer, x: torch.Tensor, of: Context) -> torch.Tensor:
    """The same layer row by row, given what the gate says of its tokens."""
    x_TD = x.reshape(-1, WIDTH)
    routing = moe.gate.route(x_TD, replace(of, rows_per_sample=x.shape[1:-1].numel()))
    rows, experts = routing.row_ids_A.tolist(), routing.expert_ids_A.tolist()
    if routing.weights_A is None:
        w1, b1 = moe.experts.w1, moe.experts.b1
        hidden = [x_TD[row] @ w1[expert] + b1[expert] for row, expert in zip(rows, experts, strict=True)]
        hidden_A = torch.stack(hidden) if hidden else x_TD.new_zeros(0, HIDDEN)
        routing = moe.gate.weigh(routing, hidden_A)
    return mixture_output(x_TD, rows, experts, routing.weights_A, functions_of(moe.experts)).reshape(x.shape)


@given(
    shape=st.sampled_from([(6,), (0,), (1,), (2, 3), (1, 5), (3, 1), (2, 2, 3), (0, 2, 2), (1, 1, 1)]),
    name=st.sampled_from(ROUTED_FORMS),
    num_experts=st.integers(5, 7),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40, derandomize=True)
def test_outputs_and_gradients_equal_the_loop_for_any_number_of_axes(shape, name, num_experts, seed):
    moe = FORMS[name].layer(num_experts, seed=seed).double()
    of = context(shape[0], training=FORMS[name].trained)
    x = tokens(*shape, WIDTH, seed=seed, dtype=torch.float64)
    towards = tokens(*x.shape, seed=seed + 1, dtype=torch.float64)

    def with_gradients(compute):
        leaf = x.clone().requires_grad_()
        y = compute(leaf)
        moe.zero_grad()
        (y * towards).sum().backward()
        # The loop leaves no gradient where it touched nothing; ours must be zero there.
        return y, *(
            torch.zeros_like(one) if one.grad is None else one.grad.clone() for one in (leaf, *moe.parameters())
        )

    ours = with_gradients(lambda leaf: moe(leaf, of)[0])
    expected = with_gradients(lambda leaf: by_the_loop(moe, leaf, of))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)  # float64: the order of summation


@pytest.mark.parametrize("k", [1, 2])
def test_experts_that_get_no_token_or_every_token(k):
    # Expert 0 comes first for all, 1 second; 2 and 3 get nothing.
    gate = TopKGate(nn.Linear(WIDTH, 4), 4, k=k, renormalize=k > 1)
    with torch.no_grad():
        gate.network.weight.mul_(0.01)
        gate.network.bias.copy_(torch.tensor([3.0, 2.0, -1.0, -2.0]))
    moe = MoELayer(gate, MLPExperts(range(4), WIDTH, HIDDEN)).double()
    x = tokens(5, 2, WIDTH, dtype=torch.float64)
    y, routing = moe(x, context(5))
    assert routing.rows_per_expert().tolist() == [10, 10 * (k - 1), 0, 0]
    torch.testing.assert_close(y, by_the_loop(moe, x, context(5)), rtol=1e-10, atol=1e-12)
    y.sum().backward()
    unused = moe.experts.w1.grad[2:], moe.experts.b2.grad[2:]
    assert [float(one.abs().max()) for one in unused] == [0.0, 0.0]
    assert float(moe.experts.w1.grad[0].abs().max()) > 0


@pytest.mark.parametrize(("shape", "rows_per_sample"), [((4,), 1), ((4, 5), 5), ((4, 2, 3), 6)])
def test_the_routing_says_how_many_tokens_a_sample_has(shape, rows_per_sample):
    _, routing = FORMS["topk-2"].layer()(tokens(*shape, WIDTH), context(4))
    assert (routing.num_rows, routing.rows_per_sample) == (4 * rows_per_sample, rows_per_sample)


def test_capacity_acts_inside_an_image_of_a_feature_map():
    gate = TopKGate(Given(), 2, k=1, renormalize=False, capacity_factor=1.0, group="image")
    moe = MoELayer(gate, ModuleExperts(range(2), nn.Identity))
    x = torch.tensor([1.0, 0.0]).expand(3, 2, 2, 2)  # three images of 2 x 2 tokens, all for expert 0
    y, routing = moe(x, context(3))
    # Capacity 1.0 * 1 * 4 / 2 = 2: the first two tokens of each image, which are its first row of pixels.
    assert routing.row_ids_A.tolist() == [0, 1, 4, 5, 8, 9]
    assert [bool(token.abs().sum() > 0) for token in y.reshape(12, 2)] == [True, True, False, False] * 3


def test_whole_images_can_be_tokens():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(2 * 4 * 4, 3))
    experts = ModuleExperts(range(3), lambda: nn.Conv2d(2, 2, 3, padding=1))
    moe = MoELayer(TopKGate(network, 3, k=2), experts, token_dims=3)
    x = torch.randn(5, 2, 4, 4)
    y, routing = moe(x, context(5))
    probs = network(x).softmax(-1)
    choices = top_k_choices(probs.tolist(), 2)
    for row, (first, second) in enumerate(choices):
        modules = list(experts.modules_by_id.values())
        odds = probs[row, first], probs[row, second]
        expected = (odds[0] * modules[first](x[row : row + 1]) + odds[1] * modules[second](x[row : row + 1]))[0]
        torch.testing.assert_close(y[row], expected / sum(odds), rtol=1e-4, atol=1e-5)  # float32 convolutions
    assert (routing.num_rows, routing.rows_per_sample) == (5, 1)


NETWORKS = {
    "linear": LinearNetwork(),
    "mlp": MLPNetwork(hidden=(5,)),
    "cnn": CNNNetwork(channels=(2,), hidden=4),
    "cosine": CosineNetwork(),
}


@pytest.mark.parametrize("name", sorted(GATES))
@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_gates_look_at_images_and_patches_through_any_network_before_experts_that_are_cnns(name, network):
    torch.manual_seed(0)
    shape = (2, 4, 4)
    section = SECTIONS.validate_python({"name": name, **({"k": 1} if name == "hash" else {})})
    gate = build_gate(section, 2, network_factory(NETWORKS[network], shape), hidden=6)
    experts = ModuleExperts(range(2), lambda: PooledCNN(shape, (3,), 6, 7, with_hidden=gate.needs_hidden))
    moe = MoELayer(gate, experts, token_dims=3).double()
    x = tokens(3, 2, *shape, dtype=torch.float64).requires_grad_()  # three images of two patches
    y, routing = moe(x, context(3))
    assert y.shape == (3, 2, 7)
    patches = x.flatten(0, 1)
    rows = patches if routing.mixing is None else routing.mixing.to_slots(patches)
    outputs = []
    for row, expert in zip(routing.row_ids_A.tolist(), routing.expert_ids_A.tolist(), strict=True):
        result = list(experts.modules_by_id.values())[expert](rows[row : row + 1])
        outputs.append(result[0][0] if isinstance(result, tuple) else result[0])
    expected = torch.zeros(routing.num_rows, 7, dtype=torch.float64)
    for row, weight, output in zip(routing.row_ids_A.tolist(), routing.weights_A, outputs, strict=True):
        expected[row] = expected[row] + weight * output
    expected = expected if routing.mixing is None else routing.mixing.from_slots(expected)
    torch.testing.assert_close(y.flatten(0, 1), expected, rtol=1e-9, atol=1e-11)
    (y * tokens(3, 2, 7, seed=2, dtype=torch.float64)).sum().backward()
    silent = [name for name, one in gate.named_parameters() if not float(one.grad.abs().max()) > 0]
    assert silent == []


@pytest.mark.parametrize("form", forms_that(lambda form: form.settings == {}))
def test_a_shared_expert_works_on_every_token_beside_the_chosen_ones(form):
    moe = form.layer().double()
    x, of = tokens(2, 3, WIDTH, dtype=torch.float64), context(2, training=form.trained)
    plain, _ = moe(x, of)
    torch.manual_seed(1)
    moe.shared = nn.Linear(WIDTH, WIDTH).double()
    shared, _ = moe(x, of)
    torch.testing.assert_close(shared - plain, moe.shared(x), rtol=1e-9, atol=1e-11)
    shared.sum().backward()
    assert moe.shared.weight.grad.tolist() == [pytest.approx(x.sum((0, 1)).tolist())] * WIDTH


def test_a_shared_expert_that_has_worked_while_rows_travelled_works_once():
    class Travelling(LocalDispatcher):
        def dispatch(self, x_T, row_ids_A, expert_ids_A, meanwhile=None):
            meanwhile()
            events.append("rows arrive")
            return super().dispatch(x_T, row_ids_A, expert_ids_A)

    events: list[str] = []
    moe = FORMS["topk-2"].layer()
    moe.shared = nn.Linear(WIDTH, WIDTH)
    x = tokens(4, WIDTH)
    expected = moe(x, context(4))[0]
    moe.dispatcher = Travelling(moe.gate.num_experts)
    moe.shared.register_forward_hook(lambda *_: events.append("shared"))
    assert torch.equal(moe(x, context(4))[0], expected)
    assert events == ["shared", "rows arrive"]


@pytest.mark.parametrize("shape", [(4,), (4, 6), (4, 2, 3)])
@pytest.mark.parametrize("form", forms_that(lambda form: form.settings == {}))
def test_positions_of_a_map_are_tokens_of_their_image_in_any_arrangement(form, shape):
    moe = form.layer()
    x = tokens(*shape, WIDTH)
    y, routing = moe(x, context(4))
    flat, _ = moe(x.reshape(4, -1, WIDTH), context(4))
    assert torch.equal(y, flat.reshape(x.shape))
    assert routing.rows_per_sample == x[0].numel() // WIDTH
    rows = 4 * 5 if form.name == "soft" else 4 * routing.rows_per_sample  # five experts of one slot an image
    assert routing.num_rows == rows


def test_without_a_context_it_gives_the_same():
    moe, x = FORMS["topk-2"].layer(), tokens(4, 5, WIDTH)
    assert torch.equal(moe(x)[0], moe(x, context(4))[0])
    assert moe(x)[1].rows_per_sample == 5


class ContextKeeper(DenseGate):
    """Remembers what it was given."""

    noisy = True

    def route(self, x_T, context):
        self.seen = context
        return super().route(x_T, context)


def test_without_a_context_noise_is_keyed_by_torchs_generator_in_training_only():
    gate = ContextKeeper(nn.Linear(WIDTH, 2), 2)
    moe = MoELayer(gate, MLPExperts(range(2), WIDTH, HIDDEN))
    x = torch.randn(4, WIDTH)
    seeds = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        moe(x)
        seeds.append(gate.seen.seed)
    assert seeds[0] == seeds[1] != seeds[2]
    assert gate.seen.training
    moe.eval()
    state = torch.get_rng_state()
    moe(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert not gate.seen.training
    assert gate.seen.sample_ids.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("form", TRAINED_FORMS)
def test_without_a_context_only_noisy_gates_draw_from_torchs_generator(form):
    moe, x = form.layer(), tokens(4, 5, WIDTH)
    state = torch.get_rng_state()
    moe(x)
    untouched = torch.equal(torch.get_rng_state(), state)
    assert untouched == (form.name not in ("noisy_topk", "switch"))


def test_only_hidden_states_come_back_before_an_attentive_gate_weighs():
    class Seen(LocalDispatcher):
        def gather(self, outputs, plan):
            gathered.append(outputs)
            return super().gather(outputs, plan)

    class KeepingExperts(MLPExperts):
        def forward(self, rows_R, rows_per_expert_L):
            results.append(super().forward(rows_R, rows_per_expert_L))
            return results[-1]

    gathered, results = [], []
    gate = FORMS["attentive"].gate(3)
    moe = MoELayer(gate, KeepingExperts(range(3), WIDTH, HIDDEN, with_hidden=True), Placement(dispatcher=Seen))
    moe(tokens(4, WIDTH), context(4))
    assert len(gathered) == 1
    assert gathered[0] is results[0][1]
    # A gate that has its weights already asks for nothing back, whatever the experts show.
    moe.gate = FORMS["topk-2"].gate(3)
    moe(tokens(4, WIDTH), context(4))
    assert len(gathered) == 1


@pytest.mark.parametrize("form", forms_that(lambda form: form.settings == {}))
def test_the_output_has_the_inputs_dtype_and_is_close_in_bfloat16(form):
    moe, x = form.layer(), tokens(6, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = moe(x, context(6))
        y_half, _ = moe(x.bfloat16(), context(6))
    assert (y.dtype, y_half.dtype) == (torch.float32, torch.bfloat16)
    # bfloat16 keeps 8 bits: two matrix products of a few terms of size about 1 are off by up to a few times 2^-8.
    torch.testing.assert_close(y, moe(x, context(6))[0], rtol=0.05, atol=0.05)
    exact, _ = moe(x.bfloat16().float(), context(6))
    torch.testing.assert_close(y_half.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", sorted(GATES))
def test_two_threads_give_the_same_bits_every_time(name):
    settings_of = {"expert_choice": {"capacity_factor": 2.0}, "soft": {"slots_per_expert": 4}}
    capacity = {"capacity_factor": 1.25} if name in ("topk", "switch", "sigmoid", "hash") else {}
    form = Form(name, {**settings_of.get(name, {}), **capacity})
    moe = form.layer(4, 32, 32)
    x = tokens(8, 48, 32)

    def once() -> list[torch.Tensor]:
        moe.zero_grad()
        leaf = x.clone().requires_grad_()
        y, _ = moe(leaf, context(8))
        y.square().sum().backward()
        return [y.detach(), leaf.grad, *(parameter.grad.clone() for parameter in moe.parameters())]

    assert_equal_bits_on_two_threads(once)


def test_what_does_not_fit_is_refused_with_the_reason():
    gate = DenseGate(nn.Linear(WIDTH, 3), 3)
    for ids in (range(2), range(1, 4), range(2, -1, -1), range(4)):
        reason = rf"experts \{list(ids)} for a gate that chooses among 3, of which \[0, 1, 2\] must"
        with pytest.raises(ValueError, match=reason):
            MoELayer(gate, MLPExperts(ids, WIDTH, HIDDEN))
    moe = MoELayer(gate, MLPExperts(range(3), WIDTH, HIDDEN))
    with pytest.raises(ValueError, match=r"an input of shape \[3\] has no axis before the 1 of a token"):
        moe(tokens(WIDTH))
    with pytest.raises(ValueError, match="the context is of 5 samples, the input has 4"):
        moe(tokens(4, WIDTH), context(5))
