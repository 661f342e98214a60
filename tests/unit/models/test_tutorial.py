from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from distmoe.config import load_config, parse_config
from distmoe.contracts import Context, DataSpec
from distmoe.models import build_model
from distmoe.models.tutorial import PooledCNN, TutorialMixture
from distmoe.training.cost import measure_cost

SPEC = DataSpec("little", (3, 8, 8), 4, tuple("abcd"), (100.0, 110.0, 120.0), (50.0, 60.0, 70.0))
CIFAR10 = DataSpec("cifar10", (3, 32, 32), 10, tuple("abcdefghij"), (125.0,) * 3, (63.0,) * 3)
CONFIGS = Path(__file__).resolve().parents[3] / "configs"
MODEL = {"name": "tutorial", "channels": [4, 6], "hidden": 8, "gate_channels": [3], "gate_hidden": 4}


def mixture(num_experts: int = 3) -> TutorialMixture:
    values = {"model": MODEL, "moe": {"num_experts": num_experts, "gate": {"name": "dense"}}}
    return build_model(parse_config(values, "test"), SPEC)  # type: ignore[return-value]


def images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def context(count: int, training: bool = False) -> Context:
    return Context(0, 0, torch.arange(count), training)


def test_a_pooled_cnn_is_its_layers_in_order():
    torch.manual_seed(0)
    network = PooledCNN((3, 9, 8), channels=(4, 6), hidden=5, num_outputs=2)
    x = torch.randn(2, 3, 9, 8)
    first, second = network.convolutions
    shrunk = F.max_pool2d(F.relu(F.conv2d(x, first.weight, first.bias, padding=1)), 2)
    shrunk = F.max_pool2d(F.relu(F.conv2d(shrunk, second.weight, second.bias, padding=1)), 2)
    assert shrunk.shape == (2, 6, 2, 2)  # 9 x 8, then 4 x 4, then 2 x 2
    hidden = F.relu(shrunk.flatten(1) @ network.fc1.weight.T + network.fc1.bias)
    expected = hidden @ network.fc2.weight.T + network.fc2.bias
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-6)  # float32


def test_the_output_is_the_gate_weighted_sum_of_the_experts_probabilities():
    model, pixels = mixture(), images(6)
    output = model(pixels, context(6))
    x = (pixels.float() - torch.tensor(SPEC.mean).view(3, 1, 1)) / torch.tensor(SPEC.std).view(3, 1, 1)
    gate = model.gate.network(x).softmax(-1)
    experts = [expert(x).softmax(-1) for expert in model.experts.modules_by_id.values()]
    expected = sum(gate[:, index, None] * probs for index, probs in enumerate(experts))
    torch.testing.assert_close(output.scores.exp(), expected, rtol=1e-4, atol=1e-6)  # float32, another batch size
    torch.testing.assert_close(output.scores.exp().sum(-1), torch.ones(6), rtol=1e-5, atol=0)
    torch.testing.assert_close(output.routings["mixture"].probs_TE, gate, rtol=1e-5, atol=1e-6)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    picked = -expected[torch.arange(6), labels].log()
    torch.testing.assert_close(output.losses(labels), picked, rtol=1e-4, atol=1e-5)


def test_every_part_learns():
    model = mixture()
    model(images(6), context(6, training=True)).losses(torch.tensor([0, 1, 2, 3, 0, 1])).sum().backward()
    assert [name for name, value in model.named_parameters() if float(value.grad.abs().sum()) == 0.0] == []


@pytest.mark.parametrize("training", [False, True])
def test_no_images_give_no_scores_and_zero_gradients(training):
    model = mixture().train(training)
    output = model(images(0), context(0, training))
    assert output.scores.shape == (0, 4)
    output.losses(torch.zeros(0, dtype=torch.long)).sum().backward()
    assert [float(value.grad.abs().sum()) for value in model.parameters()] == [0.0] * len(list(model.parameters()))


def test_one_image_more_does_not_change_the_others():
    model = mixture()
    alone, together = model(images(1), context(1)).scores, model(images(5), context(5)).scores
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)  # float32, another batch size


def test_the_twin_is_an_expert_alone():
    twin = build_model(parse_config({"model": {"name": "tutorial_cnn", "channels": [4, 6], "hidden": 8}}, "test"), SPEC)
    expert = mixture().experts.modules_by_id["1"]
    twin.network.load_state_dict(expert.state_dict())
    output = twin(images(3), context(3))
    torch.testing.assert_close(output.logits, expert(twin.normalize(images(3))))
    torch.testing.assert_close(
        output.losses(torch.tensor([1, 0, 3])),
        F.cross_entropy(output.logits, torch.tensor([1, 0, 3]), reduction="none"),
    )
    assert output.routings == {}
    assert twin(images(0), context(0)).scores.shape == (0, 4)


def config_of(name: str):
    path = CONFIGS / name
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    return load_config(path)


def cost_of(name: str):
    return measure_cost(build_model(config_of(name), CIFAR10), CIFAR10)


def test_the_twin_of_one_expert_has_an_experts_widths():
    mixed, twin = config_of("cifar10_tutorial.yaml"), config_of("cifar10_tutorial_one_expert.yaml")
    assert twin.model.name == "tutorial_cnn"
    assert (twin.model.channels, twin.model.hidden) == (mixed.model.channels, mixed.model.hidden)


@pytest.mark.parametrize(
    ("name", "quantity"),
    [
        ("cifar10_tutorial_equal_params.yaml", "num_parameters"),
        ("cifar10_tutorial_equal_flops.yaml", "active_flops_per_image"),
    ],
)
def test_the_other_twins_cost_what_the_mixture_costs(name, quantity):
    mixed, twin = cost_of("cifar10_tutorial.yaml"), cost_of(name)
    assert getattr(twin, quantity) == pytest.approx(getattr(mixed, quantity), rel=0.02)


@pytest.mark.parametrize("twin", ["one_expert", "equal_params", "equal_flops"])
def test_twins_are_trained_like_the_mixture(twin):
    mixed, other = config_of("cifar10_tutorial.yaml"), config_of(f"cifar10_tutorial_{twin}.yaml")
    for section in ("seed", "data", "schedule", "train", "parallel"):
        assert getattr(other, section) == getattr(mixed, section)
    # A wide CNN needs a lower learning rate than the mixture: each may have its own.
    assert other.optim.model_copy(update={"lr": mixed.optim.lr}) == mixed.optim
