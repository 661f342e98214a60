from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distmoe.config import parse_config
from distmoe.contracts import Context, DataSpec
from distmoe.models import build_model
from distmoe.models.convnet import BatchNorm, ConvNet
from distmoe.moe.layer import MoELayer
from tests.oracles import mixture_output, mlp_experts, top_k_choices

SPEC = DataSpec("little", (3, 12, 8), 4, tuple("abcd"), (100.0, 110.0, 120.0), (50.0, 60.0, 70.0))


def convnet(moe: dict[str, Any] | None = None, **settings: Any) -> ConvNet:
    model = {"name": "convnet", "widths": [4, 6], "ffn_stages": [2], "ffn_hidden": 7, **settings}
    net = build_model(parse_config({"model": model, "moe": moe}, "test"), SPEC)
    torch.manual_seed(0)
    for name, value in net.named_parameters():  # a norm that starts at 1 and 0 would hide a wrong one
        if "norm" in name:
            nn.init.uniform_(value, 0.5, 1.5)
    return net  # type: ignore[return-value]


def images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 12, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def context(count: int, training: bool = False) -> Context:
    return Context(0, 0, torch.arange(count), training)


def batch_norm(norm: nn.BatchNorm2d, x: torch.Tensor, training: bool) -> torch.Tensor:
    mean, variance = norm.running_mean, norm.running_var
    if training:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    scale = norm.weight / (variance + norm.eps).sqrt()
    return (x - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)


def through_stage(stage: nn.Module, x: torch.Tensor, training: bool) -> torch.Tensor:
    pooled = F.max_pool2d(F.conv2d(x, stage.conv1.weight, padding=1), 2)
    x = F.gelu(batch_norm(stage.norm1, pooled, training))
    return F.gelu(batch_norm(stage.norm2, F.conv2d(x, stage.conv2.weight, padding=1), training))


def by_hand(net: ConvNet, pixels: torch.Tensor, training: bool, k: int | None) -> torch.Tensor:
    """The network from its own weights; k is None for dense feed-forward layers."""
    x = (pixels.double() - torch.tensor(SPEC.mean).view(3, 1, 1)) / torch.tensor(SPEC.std).view(3, 1, 1)
    x = F.gelu(F.conv2d(x, net.stem.weight, net.stem.bias, padding=1))
    x = through_stage(net.stages[0], x, training)
    x = through_stage(net.stages[1], x, training)
    block = net.ffns["2"]
    count, channels, height, width = x.shape
    tokens = torch.stack([x[b, :, i, j] for b in range(count) for i in range(height) for j in range(width)])
    centred = tokens - tokens.mean(1, keepdim=True)
    normed = centred / (tokens.var(1, correction=0, keepdim=True) + 1e-5).sqrt() * block.norm.weight + block.norm.bias
    if k is None:
        ffn = block.ffn
        y = F.gelu(normed @ ffn.fc1.weight.T + ffn.fc1.bias) @ ffn.fc2.weight.T + ffn.fc2.bias
    else:
        probs = (normed @ block.ffn.gate.network.weight.T).softmax(-1)
        choices = top_k_choices(probs.tolist(), k)
        rows = [row for row, chosen in enumerate(choices) for _ in chosen]
        weights = [
            probs[row, e] / sum(probs[row, o] for o in chosen) for row, chosen in enumerate(choices) for e in chosen
        ]
        experts = block.ffn.experts
        functions = mlp_experts(experts.w1, experts.b1, experts.w2, experts.b2, F.gelu)
        y = mixture_output(normed, rows, [e for chosen in choices for e in chosen], torch.stack(weights), functions)
    summed = (tokens + y).view(count, height * width, channels)
    return summed.amax(1) @ net.head.weight.T / 9


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("k", [None, 2])
def test_the_logits_are_those_of_the_parts_by_hand(training, k):
    net = convnet(None if k is None else {"num_experts": 4, "gate": {"name": "topk", "k": k}})
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -0.2, 0.2)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    net.double().train(training)
    with torch.no_grad():
        expected = by_hand(net, images(3), training, k)
        logits = net(images(3), context(3, training)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-12)  # float64


def test_stages_may_have_feed_forward_layers_or_not():
    assert sorted(convnet(ffn_stages=[1, 2]).ffns) == ["1", "2"]
    assert sorted(convnet(ffn_stages=[]).ffns) == []
    sparse = convnet({"num_experts": 4}, ffn_stages=[1, 2])
    assert all(isinstance(block.ffn, MoELayer) for block in sparse.ffns.values())
    routings = sparse(images(2), context(2)).routings
    # 12 x 8 halves to 6 x 4, then 3 x 2.
    assert {name: (one.num_rows, one.rows_per_sample) for name, one in routings.items()} == {
        "ffns.1": (48, 24),
        "ffns.2": (12, 6),
    }


def test_every_part_learns():
    net = convnet({"num_experts": 2, "gate": {"name": "dense"}}, ffn_stages=[1, 2])
    net(images(6), context(6, training=True)).losses(torch.tensor([0, 1, 2, 3, 0, 1])).sum().backward()
    assert [name for name, value in net.named_parameters() if float(value.grad.abs().sum()) == 0.0] == []


def test_no_images_give_no_scores_in_evaluation():
    net = convnet({"num_experts": 4, "gate": {"name": "topk", "k": 2, "capacity_factor": 1.0}}).eval()
    output = net(images(0), context(0))
    assert output.scores.shape == (0, 4)
    assert output.routings["ffns.2"].rows_per_expert().tolist() == [0] * 4


def test_evaluation_is_of_each_image_alone():
    net = convnet({"num_experts": 4}).eval()
    alone, together = net(images(1), context(1)).scores, net(images(5), context(5)).scores
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)  # float32, another batch size


def test_bfloat16_autocast_keeps_the_gate_in_float32():
    net = convnet({"num_experts": 4}).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = net(images(3), context(3))
    assert output.routings["ffns.2"].logits_TE.dtype == torch.float32
    # bfloat16 keeps 8 bits; the logits are below 1 and come from a few layers.
    torch.testing.assert_close(output.scores.float(), net(images(3), context(3)).scores, rtol=0.1, atol=0.03)


@pytest.mark.parametrize("rows", [0, 1])
def test_norm_of_too_few_values_uses_and_keeps_the_running_statistics(rows: int):
    norm = BatchNorm(2)
    norm.running_mean.copy_(torch.tensor([1.0, 2.0]))
    norm.running_var.copy_(torch.tensor([4.0, 9.0]))
    before = {name: value.clone() for name, value in norm.named_buffers()}
    x = torch.tensor([[[[3.0]], [[8.0]]]])[:rows].requires_grad_()
    y = norm(x)
    # (3 - 1) / 2 and (8 - 2) / 3, up to eps = 1e-5 under the root
    torch.testing.assert_close(y.flatten(), torch.tensor([1.0, 2.0])[: 2 * rows], rtol=1e-5, atol=0)
    y.sum().backward()
    assert norm.weight.grad is not None  # zero rows give a gradient of zero, not none
    assert norm.weight.grad.abs().sum() == (0.0 if rows == 0 else pytest.approx(3.0, rel=1e-5))
    assert all(torch.equal(value, before[name]) for name, value in norm.named_buffers())


def test_norm_of_two_values_is_torchs():
    x = torch.tensor([[[[3.0]], [[8.0]]], [[[5.0]], [[8.0]]]])
    ours, theirs = BatchNorm(2), nn.BatchNorm2d(2)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)
