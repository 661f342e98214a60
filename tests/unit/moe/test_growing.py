"""Mixtures from trained weights: sparse upcycling, growing, and experts that stay as they are."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmoe.moe.dispatch import Placement
from distmoe.moe.experts import Experts, MLPExperts, ModuleExperts
from distmoe.moe.gates.base import Gate
from distmoe.moe.gates.topk import TopKGate
from distmoe.moe.growing import FrozenExperts, exact, grown, mismatches, take_weights, upcycled
from distmoe.moe.layer import MoELayer
from distmoe.moe.mixtures import Conv2dMoE, DenseMoE
from distmoe.moe.networks import MLP
from tests.unit.moe.gate_forms import FORMS, HIDDEN, NUM_EXPERTS, WIDTH, Form, context, tokens

MORE = NUM_EXPERTS + 3
X = tokens(4, 3, WIDTH)
# Their weights sum to 1 for every token.
MIXING = ["dense", "dense-constrained", "dense-k2", "topk-2", "cosine", "sigmoid", "attentive", "hash", "uniform"]
FOUR_FORMS = ["topk-2", "sigmoid", "soft", "attentive"]


class FFN(nn.Module):
    """The dense layer: its names and shapes are those of torch's linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def ffn(seed: int = 7) -> FFN:
    torch.manual_seed(seed)
    return FFN()


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def stacked(ids: range) -> Experts:
    torch.manual_seed(0)
    return MLPExperts(ids, WIDTH, HIDDEN)


def modules(ids: range) -> Experts:
    torch.manual_seed(0)
    return ModuleExperts(ids, FFN)


def top2(experts: Experts, num_experts: int = NUM_EXPERTS) -> MoELayer:
    torch.manual_seed(1)
    gate = TopKGate(nn.Linear(WIDTH, num_experts), num_experts, k=2)
    return MoELayer(gate, experts, Placement(lambda _: experts.expert_ids))


# --- upcycling


@pytest.mark.parametrize("name", MIXING)
def test_upcycled_mixture_computes_what_the_dense_layer_does(name: str):
    layer, dense = FORMS[name].layer().double(), ffn().double()
    take_weights(upcycled(layer), dense.state_dict())
    x = X.double()
    training = FORMS[name].trained
    # float64; the weights of a token sum to 1 to rounding.
    torch.testing.assert_close(layer(x, context(12, 3, training))[0], dense(x), rtol=1e-12, atol=1e-12)


def test_every_expert_is_the_dense_layer_and_everything_else_is_fresh():
    layer, dense = FORMS["sigmoid"].layer(), ffn()
    layer.shared = ffn(seed=8)
    before = values(layer)
    take_weights(upcycled(layer), dense.state_dict())
    for expert in range(NUM_EXPERTS):
        assert torch.equal(layer.experts.w1[expert], dense.fc1.weight.T)
        assert torch.equal(layer.experts.b1[expert], dense.fc1.bias)
        assert torch.equal(layer.experts.w2[expert], dense.fc2.weight.T)
        assert torch.equal(layer.experts.b2[expert], dense.fc2.bias)
    fresh = {name for name, value in values(layer).items() if torch.equal(value, before[name])}
    shared = {f"shared.{part}" for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")}
    assert fresh == {"gate.network.weight", "gate.network.bias", "gate.balancer.bias_E"} | shared


def test_upcycled_layers_of_a_model_come_from_the_layers_in_their_places():
    torch.manual_seed(3)
    model = nn.ModuleDict({"a": nn.ModuleDict({"ffn": top2(modules(range(3)), 3)}), "b": top2(stacked(range(3)), 3)})
    model["stem"] = nn.Linear(2, WIDTH)
    dense = nn.ModuleDict({"a": nn.ModuleDict({"ffn": ffn(1)}), "b": ffn(2), "stem": nn.Linear(2, WIDTH)})
    take_weights(upcycled(model), dense.state_dict())
    assert torch.equal(model["stem"].weight, dense["stem"].weight)
    torch.testing.assert_close(model["a"]["ffn"](X)[0], dense["a"]["ffn"](X))
    torch.testing.assert_close(model["b"](X)[0], dense["b"](X))


def gate_gradient(layer: MoELayer) -> float:
    layer.zero_grad()
    (layer(X)[0] * tokens(4, 3, WIDTH, seed=2)).sum().backward()
    return float(layer.gate.network.weight.grad.norm())


@pytest.mark.parametrize("experts", [stacked, modules])
def test_equal_experts_give_the_gate_no_gradient_and_noise_does(experts: Callable[[range], Experts]):
    layer, dense = top2(experts(range(NUM_EXPERTS))), ffn()
    fresh = gate_gradient(layer)
    take_weights(upcycled(layer), dense.state_dict())
    assert gate_gradient(layer) < 1e-6 * fresh
    noisy = []
    for noise_std in (0.001, 0.01):
        take_weights(upcycled(layer, noise_std), dense.state_dict())
        noisy.append(gate_gradient(layer))
    assert noisy[1] > 1e-4 * fresh
    assert noisy[1] / noisy[0] == pytest.approx(10.0, rel=0.1)  # in proportion to the noise, but for GELU's curvature


def test_noise_is_on_matrices_and_relative_to_their_spread():
    wide, hidden = 64, 128
    torch.manual_seed(0)
    layer = MoELayer(TopKGate(nn.Linear(wide, 3), 3), MLPExperts(range(3), wide, hidden))
    dense = nn.ModuleDict({"fc1": nn.Linear(wide, hidden), "fc2": nn.Linear(hidden, wide)})
    take_weights(upcycled(layer, noise_std=0.25), dense.state_dict())
    for own, trained in ((layer.experts.w1, dense["fc1"].weight.T), (layer.experts.w2, dense["fc2"].weight.T)):
        noise_ELH = (own - trained).detach() / trained.detach().std(correction=0)
        # 8192 draws an expert: the standard deviation is known to 0.8 %, the mean to 0.25 / 90.
        assert [float(noise.std()) for noise in noise_ELH] == pytest.approx([0.25] * 3, rel=0.04)
        assert [float(noise.mean()) for noise in noise_ELH] == pytest.approx([0.0] * 3, abs=0.012)
        correlations = torch.corrcoef(noise_ELH.flatten(1))
        assert float((correlations - torch.eye(3)).abs().max()) < 0.05
    assert torch.equal(layer.experts.b1, dense["fc1"].bias.expand(3, -1))
    assert torch.equal(layer.experts.b2, dense["fc2"].bias.expand(3, -1))


@pytest.mark.parametrize("experts", [stacked, modules])
def test_noise_of_an_expert_depends_on_the_seed_the_layer_and_its_global_id_only(
    experts: Callable[[range], Experts],
):
    def first_matrices(ids: range, seed: int = 0, name: str = "ffn") -> list[Tensor]:
        model = nn.ModuleDict({name: top2(experts(ids))})
        trained = nn.ModuleDict({name: ffn()})
        take_weights(upcycled(model, 0.1, seed), trained.state_dict())
        own = model[name].experts
        if isinstance(own, MLPExperts):
            return list(own.w1.detach().transpose(1, 2))
        return [expert.fc1.weight.detach() for expert in own.modules_by_id.values()]

    whole = first_matrices(range(NUM_EXPERTS))
    assert all(map(torch.equal, first_matrices(range(2, 4)), whole[2:4]))
    assert not torch.equal(first_matrices(range(2, 4), seed=1)[0], whole[2])
    assert not torch.equal(first_matrices(range(2, 4), name="other")[0], whole[2])


def test_experts_of_another_kind_cannot_be_upcycled():
    with pytest.raises(ValueError, match="LinearExperts cannot start from a dense network"):
        upcycled(DenseMoE(WIDTH, WIDTH, num_experts=2))


# --- growing


def trained_and_grown(form: Form) -> tuple[MoELayer, dict[str, Tensor], MoELayer]:
    """A layer, the fresh values of a larger one, and that one grown from the first."""
    small, large = form.layer(seed=1), form.layer(MORE, seed=2)
    for buffer in small.buffers():  # balancers start at zero, which would hide a wrong one
        buffer.copy_(torch.tensor([3.0, 1.0, 4.0, 1.0, 6.0]))
    fresh = values(large)
    take_weights(grown(large, NUM_EXPERTS), small.state_dict())
    return small, fresh, large


# Columns of the gate's outputs that belong to the first experts: in the small gate, in the large one.
COLUMNS = {
    "noisy_topk": (range(10), [0, 1, 2, 3, 4, 8, 9, 10, 11, 12]),  # logits, then deviations
    "soft": (range(10), range(10)),  # two slots an expert
    "cosine": (range(5), range(5)),
}


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.trained])
def test_grown_layer_has_the_trained_experts_and_outputs_of_the_gate_first(name: str):
    small, fresh, large = trained_and_grown(FORMS[name])
    alone = FORMS[name].layer(MORE, seed=2)
    if small.gate.network is not None and name != "attentive":
        ours, theirs, before = (one.gate.logits(X.flatten(0, 1)) for one in (large, small, alone))
        own_columns, columns = COLUMNS.get(name, (range(NUM_EXPERTS), range(NUM_EXPERTS)))
        torch.testing.assert_close(ours[:, list(columns)], theirs[:, list(own_columns)])
        if name != "cosine":  # whose projection is trained too
            rest = [column for column in range(ours.shape[1]) if column not in columns]
            torch.testing.assert_close(ours[:, rest], before[:, rest])
    for part in ("w1", "b1", "w2", "b2"):
        own = getattr(large.experts, part)
        assert torch.equal(own[:NUM_EXPERTS], getattr(small.experts, part))
        assert torch.equal(own[NUM_EXPERTS:], fresh[f"experts.{part}"][NUM_EXPERTS:])


def test_what_a_gate_has_but_once_is_taken_whole():
    small, fresh, large = trained_and_grown(FORMS["cosine"])
    for name in ("gate.network.weight", "gate.network.bias", "gate.head.log_scale"):
        assert torch.equal(large.state_dict()[name], small.state_dict()[name])
    directions = large.gate.head.directions
    assert torch.equal(directions[:, :NUM_EXPERTS], small.gate.head.directions)
    assert torch.equal(directions[:, NUM_EXPERTS:], fresh["gate.head.directions"][:, NUM_EXPERTS:])
    small, _, large = trained_and_grown(FORMS["attentive"])
    for name, value in small.gate.state_dict().items():
        assert torch.equal(large.gate.state_dict()[name], value)


@pytest.mark.parametrize(("name", "buffer"), [("sigmoid", "bias_E"), ("dense-constrained", "totals_E")])
def test_new_experts_start_at_the_mean_of_a_balancer(name: str, buffer: str):
    _, _, large = trained_and_grown(FORMS[name])
    assert getattr(large.gate.balancer, buffer).tolist() == [3.0, 1.0, 4.0, 1.0, 6.0, 3.0, 3.0, 3.0]


def test_constraint_does_not_shut_out_the_trained_experts_after_growing():
    small = FORMS["dense-constrained"].layer()
    small.gate.balancer.totals_E.copy_(torch.tensor([1000.2, 1000.0, 999.9, 1000.1, 1001.0]))
    large = FORMS["dense-constrained"].layer(MORE)
    take_weights(grown(large, NUM_EXPERTS), small.state_dict())
    # Mean 1000.24, margin 0.5: as before growing.
    assert large.gate.balancer.excluded(context(1)).tolist() == [False] * 4 + [True] + [False] * 3


@pytest.mark.parametrize("gate", ["full", "pooled", "position"])
def test_each_filter_of_a_convolutional_mixture_keeps_its_weights(gate: str):
    def layer(num_experts: int) -> Conv2dMoE:
        return Conv2dMoE(2, 3, num_experts, 3, 4, padding="same", gate=gate)

    torch.manual_seed(0)
    small, large = layer(2), layer(5)
    take_weights(grown(large, 2), small.state_dict())
    images = tokens(6, 2, 4, 4)
    ours, theirs = large(images)[1], small(images)[1]
    torch.testing.assert_close(ours.logits_TE[..., :2], theirs.logits_TE)
    assert torch.equal(large.experts.weight[:2], small.experts.weight)


@pytest.mark.parametrize("experts", [stacked, modules])
def test_part_of_the_experts_grows_as_in_the_whole(experts: Callable[[range], Experts]):
    trained = values(top2(experts(range(3)), 3))
    trained = {name: value + 1.0 for name, value in trained.items()}
    whole = top2(experts(range(NUM_EXPERTS)))
    fresh = values(whole)
    take_weights(grown(whole, 3), trained)
    expected = values(whole)
    for ids in (range(2), range(2, 4), range(3, 5)):
        part = top2(experts(ids))
        with torch.no_grad():  # fresh values are keyed by the global id
            for name, value in part.named_parameters():
                value.copy_(fresh[name][ids.start : ids.stop] if re.search(r"experts\.[wb]\d", name) else fresh[name])
        take_weights(grown(part, 3), trained)
        for name, value in values(part).items():
            own = expected[name][ids.start : ids.stop] if re.search(r"experts\.[wb]\d", name) else expected[name]
            assert torch.equal(value, own), (ids, name)
    changed = {name for name in fresh if not torch.equal(expected[name], fresh[name])}
    if isinstance(whole.experts, ModuleExperts):
        ids_changed = {name.split(".")[2] for name in changed if "modules_by_id" in name}
        assert ids_changed == {"0", "1", "2"}


def test_as_many_experts_are_taken_as_they_are_and_fewer_are_refused():
    form = FORMS["noisy_topk"]
    small, same = form.layer(seed=1), form.layer(seed=2)
    take_weights(grown(same, NUM_EXPERTS), small.state_dict())
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in same.state_dict().items())
    with pytest.raises(ValueError, match="6 trained experts are more than the 5 of this model"):
        grown(same, 6)


# --- what does not fit


def layer_with(gate: Gate, num_experts: int) -> MoELayer:
    return MoELayer(gate, MLPExperts(range(num_experts), WIDTH, HIDDEN))


def test_gate_of_another_form_is_no_smaller_form_of_this_one():
    """In all of these some shapes are multiples of the right ones, or even equal."""

    def grow(small: MoELayer, large: MoELayer) -> list[str]:
        return mismatches(grown(large, 4), small.state_dict())

    noisy, plain = Form("noisy_topk"), Form("topk")
    assert grow(noisy.layer(4), plain.layer(8)) == [
        "gate.network.bias has shape [8], this model takes [4]",
        "gate.network.weight has shape [8, 3], this model takes [4, 3]",
    ]
    two_slots, one_slot = Form("soft", {"slots_per_expert": 2}), Form("soft")
    assert [problem.split(",")[0] for problem in grow(two_slots.layer(4), one_slot.layer(8))] == [
        "gate.network.bias has shape [8]",
        "gate.network.weight has shape [8",
    ]
    hidden = grow(
        layer_with(TopKGate(MLP((WIDTH, 4, 16, 4)), 4), 4), layer_with(TopKGate(MLP((WIDTH, 8, 16, 8)), 8), 8)
    )
    assert hidden == [
        "gate.network.layers.0.bias has shape [4], this model takes [8]",
        "gate.network.layers.0.weight has shape [4, 3], this model takes [8, 3]",
        "gate.network.layers.1.weight has shape [16, 4], this model takes [16, 8]",
    ]


def test_tensors_missing_too_many_or_of_another_shape_are_named_and_nothing_is_changed():
    layer, dense = top2(stacked(range(NUM_EXPERTS))), ffn()
    before = values(layer)
    trained = {**dense.state_dict(), "extra": torch.zeros(1), "fc1.weight": torch.zeros(WIDTH, HIDDEN)}
    del trained["fc2.bias"]
    problems = [
        "extra is not in this model",
        "fc1.weight has shape [3, 4], this model takes [4, 3]",
        "fc2.bias is missing",
    ]
    assert mismatches(upcycled(layer), trained) == problems
    with pytest.raises(ValueError, match=re.escape(f"3 of the trained tensors do not fit: {'; '.join(problems)}")):
        take_weights(upcycled(layer), trained)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("name", FOUR_FORMS)
def test_exact_is_every_tensor_of_the_same_name(name: str):
    one, other = FORMS[name].layer(seed=1), FORMS[name].layer(seed=2)
    assert mismatches(exact(other), one.state_dict()) == []
    take_weights(exact(other), one.state_dict())
    assert all(torch.equal(value, one.state_dict()[key]) for key, value in other.state_dict().items())
    smaller = FORMS[name].layer(4).state_dict()
    assert "experts.b1 has shape [4, 4], this model takes [5, 4]" in mismatches(exact(other), smaller)


# --- frozen experts

OPTIMIZERS = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=0.1, weight_decay=0.1),
}


def by_expert(experts: Experts) -> list[list[Tensor]]:
    """Copies of each expert's weights."""
    if isinstance(experts, MLPExperts):
        return [[stack[index].detach().clone() for stack in experts.parameters()] for index in range(len(experts.w1))]
    return [[weight.detach().clone() for weight in one.parameters()] for one in experts.modules_by_id.values()]


def gradients_by_expert(experts: Experts) -> list[float]:
    """Norm of each expert's gradient."""
    if isinstance(experts, MLPExperts):
        pieces = [[stack.grad[index] for stack in experts.parameters()] for index in range(len(experts.w1))]
    else:
        pieces = [[weight.grad for weight in one.parameters()] for one in experts.modules_by_id.values()]
    return [float(torch.cat([piece.flatten() for piece in of_one]).norm()) for of_one in pieces]


@pytest.mark.parametrize("experts", [stacked, modules])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_experts_keep_their_weights_bit_for_bit(experts: Callable[[range], Experts], optimizer: str):
    layer = MoELayer(FORMS["dense"].gate(), experts(range(NUM_EXPERTS)))
    reference = MoELayer(FORMS["dense"].gate(), experts(range(NUM_EXPERTS)))
    reference.load_state_dict(layer.state_dict())
    frozen, step = FrozenExperts(layer, 2), OPTIMIZERS[optimizer](layer.parameters())
    before = by_expert(layer.experts)
    for number in range(3):
        step.zero_grad()
        for half in (X[:2], X[2:]):  # gradients add up over micro-batches
            layer(half)[0].square().sum().backward()
        norms = gradients_by_expert(layer.experts)
        assert norms[:2] == [0.0, 0.0]
        if number == 0:
            reference(X)[0].square().sum().backward()
            assert norms[2:] == pytest.approx(gradients_by_expert(reference.experts)[2:], rel=1e-5)
        with frozen.unchanged():
            step.step()
    same = [all(map(torch.equal, old, new)) for old, new in zip(before, by_expert(layer.experts), strict=True)]
    assert same == [True, True, False, False, False]
    assert not torch.equal(layer.gate.network.weight, reference.gate.network.weight)


@pytest.mark.parametrize("experts", [stacked, modules])
def test_experts_are_frozen_by_their_global_id(experts: Callable[[range], Experts]):
    for ids, expected in ((range(2), [True, True]), (range(2, 4), [True, False]), (range(3, 5), [False, False])):
        layer = top2(experts(ids))
        frozen, step = FrozenExperts(layer, 3), OPTIMIZERS["sgd"](layer.experts.parameters())
        before = by_expert(layer.experts)
        layer.experts(X.flatten(0, 1), torch.tensor([6, 6])).sum().backward()
        with frozen.unchanged():
            step.step()
        same = [all(map(torch.equal, old, new)) for old, new in zip(before, by_expert(layer.experts), strict=True)]
        assert same == expected


def test_a_gradient_that_is_not_finite_does_not_pass_a_frozen_expert():
    layer = MoELayer(FORMS["dense"].gate(), stacked(range(NUM_EXPERTS)))
    FrozenExperts(layer, NUM_EXPERTS)
    (layer(X)[0] * torch.inf).sum().backward()
    assert gradients_by_expert(layer.experts) == [0.0] * NUM_EXPERTS


def test_frozen_modules_may_hold_single_numbers():
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain

    layer = top2(ModuleExperts(range(3), Gain), 3)
    frozen, step = FrozenExperts(layer, 1), OPTIMIZERS["sgd"](layer.parameters())
    layer(X)[0].sum().backward()
    with frozen.unchanged():
        step.step()
    assert [float(expert.gain.detach()) == 2.0 for expert in layer.experts.modules_by_id.values()] == [
        True,
        False,
        False,
    ]


def test_more_frozen_experts_than_there_are_is_an_error():
    with pytest.raises(ValueError, match=r"frozen experts \(6\) must be at most that of all \(5\)"):
        FrozenExperts(top2(stacked(range(2))), 6)
    with pytest.raises(ValueError, match=r"frozen experts \(1\) must be at most that of all \(0\)"):
        FrozenExperts(ffn(), 1)
