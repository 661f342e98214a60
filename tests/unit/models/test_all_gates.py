"""Every gate inside the models that users train: it learns, keeps images apart, and draws noise by sample."""

from typing import Any

import pytest
import torch

from distmoe.config import parse_config
from distmoe.contracts import Context, DataSpec, UserError
from distmoe.models import build_model
from distmoe.models.protocol import Network
from distmoe.moe.dispatch import Placement
from distmoe.moe.gates import GATES
from distmoe.moe.sums import NoReduction

SPEC = DataSpec("little", (3, 16, 16), 4, tuple("abcd"), (100.0, 110.0, 120.0), (50.0, 60.0, 70.0))
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
# What a gate needs besides its name to be used to the full.
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {"margin": 0.5},
    "topk": {"capacity_factor": 1.25, "priority": "score"},
    "switch": {"jitter": 0.1, "capacity_factor": 1.25},
    "hash": {"k": 2},
    "soft": {"slots_per_expert": 2},
}
NO_CLASS_MIXTURE = {"switch", "expert_choice", "soft"}
GATE_NAMES = sorted(GATES)


def gate_of(name: str, **settings: Any) -> dict[str, Any]:
    return {"name": name, **SETTINGS.get(name, {}), **settings}


def convnet(name: str, num_experts: int = 3, **settings: Any) -> Network:
    model = {"name": "convnet", "widths": [4, 6], "ffn_stages": [1, 2], "ffn_hidden": 7}
    moe = {"num_experts": num_experts, "shared_hidden": 5, "gate": gate_of(name, **settings)}
    return build_model(parse_config({"model": model, "moe": moe}, "test"), SPEC)


def tutorial(gate: dict[str, Any], **moe: Any) -> Network:
    model = {"name": "tutorial", "channels": [4, 6], "hidden": 8, "gate_channels": [3], "gate_hidden": 4}
    return build_model(parse_config({"model": model, "moe": {"num_experts": 3, "gate": gate, **moe}}, "test"), SPEC)


def images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def context(start: int, stop: int, training: bool) -> Context:
    return Context(seed=3, step=5, sample_ids=torch.arange(start, stop), training=training)


@pytest.mark.parametrize(
    "model",
    [{"name": "convnet", "widths": [4, 6], "ffn_stages": [1, 2]}, {"name": "tutorial"}],
    ids=["convnet", "tutorial"],
)
def test_gates_add_over_the_ranks_of_the_placement(model):
    placement = Placement(reducer=NoReduction())
    gates = build_model(parse_config({"model": model, "moe": {"num_experts": 2}}, "test"), SPEC, placement).gates()
    assert len(gates) == len(model.get("ffn_stages", ["mixture"]))
    assert all(gate.reducer is placement.reducer for gate in gates.values())


@pytest.mark.parametrize("name", GATE_NAMES)
def test_every_part_of_the_convnet_learns(name):
    net = convnet(name)
    net(images(6), context(0, 6, True)).losses(LABELS).sum().backward()
    assert [key for key, value in net.named_parameters() if not float(value.grad.abs().sum()) > 0.0] == []


@pytest.mark.parametrize("name", GATE_NAMES)
def test_no_images_give_gradients_of_zero_and_not_none(name):
    net = convnet(name)
    net(images(0), context(0, 0, True)).losses(LABELS[:0]).sum().backward()
    assert [float(value.grad.abs().sum()) for value in net.parameters()] == [0.0] * len(list(net.parameters()))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", GATE_NAMES)
def test_an_image_gets_the_same_alone_as_among_others_noise_included(name, training):
    # The norms of the trunk look at the whole batch in training mode; here they do not.
    net = convnet(name).eval()
    together = net(images(6), context(0, 6, training)).scores
    apart = [net(images(6)[i : i + 2], context(i, i + 2, training)).scores for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(apart), together, rtol=1e-4, atol=1e-5)  # float32, another batch size


def test_noise_differs_between_steps_layers_and_seeds():
    net = convnet("noisy_topk").eval()
    first = net(images(2), context(0, 2, True)).scores
    for other in (Context(3, 6, torch.arange(2), True), Context(4, 5, torch.arange(2), True)):
        assert not torch.allclose(net(images(2), other).scores, first, atol=1e-4)
    routings = net(images(2), context(0, 2, True)).routings
    clean = net(images(2), context(0, 2, False)).routings
    drawn = {key: (one.logits_TE - clean[key].logits_TE).detach()[:8].flatten() for key, one in routings.items()}
    # Of two layers with independent noise, 24 differences correlate below 0.6 with a probability of 99.8 %.
    assert abs(float(torch.corrcoef(torch.stack(list(drawn.values())))[0, 1])) < 0.6


@pytest.mark.parametrize("network", ["linear", "mlp", "cosine"])
@pytest.mark.parametrize("name", ["topk", "noisy_topk", "soft", "attentive", "cosine"])
def test_gates_look_at_positions_through_any_network_of_vectors(name, network):
    net = convnet(name, network={"name": network})
    net(images(6), context(0, 6, True)).losses(LABELS).sum().backward()
    gates = list(net.gates().values())
    assert all(float(value.grad.abs().sum()) > 0 for gate in gates for value in gate.network.parameters())


def test_a_cnn_cannot_look_at_positions():
    with pytest.raises(
        UserError, match=r"convnet .* a CNN needs tokens of shape \(channels, height, width\), not \[4\]"
    ):
        convnet("topk", network={"name": "cnn"})


@pytest.mark.parametrize("name", sorted(GATES.keys() - NO_CLASS_MIXTURE))
def test_a_mixture_of_class_probabilities_is_one_with_every_gate_whose_weights_sum_to_one(name):
    settings = {key: value for key, value in gate_of(name).items() if key not in ("capacity_factor", "priority")}
    net = tutorial(settings)
    output = net(images(6), context(0, 6, True))
    torch.testing.assert_close(output.scores.exp().sum(-1), torch.ones(6), rtol=1e-5, atol=0)
    routing = output.routings["mixture"]
    experts = list(net.experts.modules_by_id.values())
    expected = torch.zeros(6, 4)
    for row, expert, weight in zip(routing.row_ids_A, routing.expert_ids_A, routing.weights_A, strict=True):
        scores = experts[int(expert)](net.normalize(images(6)[row : row + 1]))
        scores = scores[0] if isinstance(scores, tuple) else scores
        expected[row] += weight.detach() * scores[0].softmax(-1).detach()
    torch.testing.assert_close(output.scores.exp(), expected, rtol=1e-4, atol=1e-6)  # float32, another batch size
    output.losses(LABELS).sum().backward()
    assert [key for key, value in net.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("network", ["linear", "mlp", "cnn", "cosine"])
def test_a_gate_looks_at_images_through_any_network(network):
    net = tutorial({"name": "topk", "k": 2, "network": {"name": network}})
    net(images(6), context(0, 6, True)).losses(LABELS).sum().backward()
    assert all(float(value.grad.abs().sum()) > 0 for value in net.gates()["mixture"].parameters())


@pytest.mark.parametrize(
    ("gate", "moe", "message"),
    [
        ({"name": "switch"}, {}, "moe.gate.name switch does not mix class probabilities"),
        ({"name": "soft"}, {}, "moe.gate.name soft does not mix class probabilities"),
        ({"name": "expert_choice"}, {}, "moe.gate.name expert_choice does not mix class probabilities"),
        ({"name": "topk", "renormalize": False}, {}, "must sum to 1: moe.gate.renormalize=true"),
        ({"name": "sigmoid", "scale": 2.5}, {}, "must sum to 1: moe.gate.scale=1"),
        ({"name": "cosine", "capacity_factor": 1.0}, {}, "every sample needs all its experts"),
        ({"name": "dense"}, {"shared_hidden": 8}, "no shared expert in a mixture of class probabilities"),
    ],
)
def test_a_mixture_of_class_probabilities_refuses_what_is_none(gate, moe, message):
    with pytest.raises(UserError, match=message):
        tutorial(gate, **moe)
