import pytest
import torch
from torch import nn

from distmoe.config import AdamWSection, SGDSection
from distmoe.moe.experts import MLPExperts, ModuleExperts
from distmoe.moe.gates.topk import TopKGate
from distmoe.moe.layer import MoELayer
from distmoe.training.optim import OPTIMIZERS, build_optimizer, split_by_decay


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.moe = MoELayer(TopKGate(nn.Linear(2, 3), 3), MLPExperts(range(3), 2, 4))
        self.named = ModuleExperts(range(2), lambda: nn.Linear(2, 2))


def names(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    wanted = {id(parameter) for parameter in parameters}
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}


def test_matrices_and_filters_decay_and_vectors_do_not_whatever_is_stacked():
    model = Net()
    decayed, rest = split_by_decay(model)
    # b1 (3, 4) and b2 (3, 2) have two axes, but are a vector an expert.
    assert names(model, decayed) == {
        "conv.weight", "moe.gate.network.weight", "moe.experts.w1", "moe.experts.w2",
        "named.modules_by_id.0.weight", "named.modules_by_id.1.weight",
    }  # fmt: skip
    assert names(model, rest) == {
        "conv.bias", "norm.weight", "norm.bias", "moe.gate.network.bias", "moe.experts.b1", "moe.experts.b2",
        "named.modules_by_id.0.bias", "named.modules_by_id.1.bias",
    }  # fmt: skip
    assert len(decayed) + len(rest) == len(list(model.parameters()))


@pytest.mark.parametrize("section", [SGDSection(lr=0.5, weight_decay=0.1), AdamWSection(lr=0.5, weight_decay=0.1)])
def test_without_a_gradient_only_matrices_shrink(section):
    model = nn.Linear(2, 2)
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    optimizer = build_optimizer(section, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # Both: w - lr * decay * w = 1 - 0.5 * 0.1. SGD with momentum 0.9 takes the first gradient as it is.
    torch.testing.assert_close(model.weight.detach(), torch.full((2, 2), 0.95))
    assert model.bias.tolist() == [1.0, 1.0]


def test_sgd_takes_momentum_and_nesterov_from_its_section():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = build_optimizer(SGDSection(lr=0.1, momentum=0.5, nesterov=True), model)
    for _ in range(2):
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
    # Buffers 1 and 0.5 + 1; Nesterov's steps gradient + 0.5 * buffer: 1.5 and 1.75.
    assert float(model.weight.detach()) == pytest.approx(-0.1 * (1.5 + 1.75))


def test_adamw_takes_betas_and_eps_from_its_section():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = build_optimizer(AdamWSection(lr=0.1, betas=(0.5, 0.75), eps=1.0), model)
    for gradient in (1.0, 3.0):
        model.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
    # Step 1: moments corrected to 1 and 1: 0.1 * 1 / (1 + 1). Step 2: first 0.25 + 1.5 = 1.75 over 1 - 0.25; second
    # 0.1875 + 2.25 = 2.4375 over 1 - 0.5625.
    second = (1.75 / 0.75) / ((2.4375 / 0.4375) ** 0.5 + 1)
    assert float(model.weight.detach()) == pytest.approx(-0.1 * (0.5 + second), rel=1e-5)


def test_sections_and_table_agree():
    assert set(OPTIMIZERS) == {"sgd", "adamw"}
    for section in (SGDSection(), AdamWSection()):
        optimizer = build_optimizer(section, nn.Linear(2, 2))
        assert isinstance(optimizer, OPTIMIZERS[section.name])
        assert [group["lr"] for group in optimizer.param_groups] == [section.lr] * 2


def test_a_model_of_vectors_alone_has_one_group():
    optimizer = build_optimizer(SGDSection(weight_decay=0.1), nn.LayerNorm(3))
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [(2, 0.0)]
