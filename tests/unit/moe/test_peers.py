"""Equal to other implementations: the same weights and tokens give the same outputs, losses and gradients.

Tolerances are those of float32: the sums run in another order.
"""

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distmoe.moe.experts import MLPExperts, ModuleExperts
from distmoe.moe.gates.topk import TopKGate
from distmoe.moe.layer import MoELayer
from distmoe.moe.losses import LoadBalanceLoss
from tests.unit.moe.gate_forms import context, tokens

NUM_EXPERTS, WIDTH, HIDDEN = 4, 6, 5


def peer(module: str) -> Any:
    """A module of another package; what that warns of while it is imported is not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(module, reason=f"no {module}: install the extras deepspeed and peers")


def assert_equal_to_rounding(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within 1e-5 of the largest entry."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.detach().abs().max()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_deepspeeds_layer_without_drops(k, training, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    layer = peer("deepspeed.moe.layer")
    torch.manual_seed(0)
    gate = TopKGate(nn.Linear(WIDTH, NUM_EXPERTS, bias=False), NUM_EXPERTS, k, renormalize=k > 1)
    ours = MoELayer(gate, MLPExperts(range(NUM_EXPERTS), WIDTH, HIDDEN))
    nn.init.normal_(ours.experts.b1)
    nn.init.normal_(ours.experts.b2)
    expert = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
    # Not by random token selection, nor with noise on the second choice: it would be there in evaluation too.
    theirs = layer.MoE(
        WIDTH, expert, NUM_EXPERTS, k=k, drop_tokens=False, min_capacity=0, use_rts=False,
        top2_2nd_expert_sampling=False,
    )  # fmt: skip
    their_gate = theirs.deepspeed_moe.gate.wg.weight
    their_experts = list(theirs.deepspeed_moe.experts.deepspeed_experts)
    with torch.no_grad():
        their_gate.copy_(gate.network.weight)
        for index, one in enumerate(their_experts):
            one[0].weight.copy_(ours.experts.w1[index].T)
            one[0].bias.copy_(ours.experts.b1[index])
            one[2].weight.copy_(ours.experts.w2[index].T)
            one[2].bias.copy_(ours.experts.b2[index])
    ours.train(training)
    theirs.train(training)

    our_x, their_x = (tokens(3, 7, WIDTH).requires_grad_() for _ in range(2))
    our_y, routing = ours(our_x, context(3, training=training))
    their_y, their_loss, their_counts = theirs(their_x)
    assert_equal_to_rounding(our_y, their_y)
    assert routing.rows_per_expert().tolist() == their_counts.tolist()
    our_loss = LoadBalanceLoss().value(routing)
    if k != 2:  # with two choices theirs counts the first alone
        assert_equal_to_rounding(our_loss, their_loss)
    towards = tokens(3, 7, WIDTH, seed=2)
    ((our_y * towards).sum() + (k != 2) * our_loss).backward()
    ((their_y * towards).sum() + (k != 2) * their_loss).backward()
    assert_equal_to_rounding(our_x.grad, their_x.grad)
    assert_equal_to_rounding(gate.network.weight.grad, their_gate.grad)
    for index, one in enumerate(their_experts):
        assert_equal_to_rounding(ours.experts.w1.grad[index], one[0].weight.grad.T)
        assert_equal_to_rounding(ours.experts.b1.grad[index], one[0].bias.grad)
        assert_equal_to_rounding(ours.experts.w2.grad[index], one[2].weight.grad.T)
        assert_equal_to_rounding(ours.experts.b2.grad[index], one[2].bias.grad)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``, the expert of Mixtral."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Linear(WIDTH, 2 * HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


@pytest.mark.parametrize("k", [2, 3])
def test_mixtrals_sparse_block(k):
    mixtral = peer("transformers.models.mixtral.modeling_mixtral")
    config = mixtral.MixtralConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_local_experts=NUM_EXPERTS, num_experts_per_tok=k,
        num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1, vocab_size=8,
    )  # fmt: skip
    theirs = mixtral.MixtralSparseMoeBlock(config)
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    gate = TopKGate(nn.Linear(WIDTH, NUM_EXPERTS, bias=False), NUM_EXPERTS, k)
    ours = MoELayer(gate, ModuleExperts(range(NUM_EXPERTS), SwiGLU))
    our_experts = list(ours.experts.modules_by_id.values())
    with torch.no_grad():
        gate.network.weight.copy_(theirs.gate.weight)
        for index, expert in enumerate(our_experts):
            expert.gate_up.weight.copy_(theirs.experts.gate_up_proj[index])
            expert.down.weight.copy_(theirs.experts.down_proj[index])

    our_x, their_x = (tokens(3, 7, WIDTH).requires_grad_() for _ in range(2))
    our_y, _ = ours(our_x, context(3))
    their_y = theirs(their_x)
    assert_equal_to_rounding(our_y, their_y)
    towards = tokens(3, 7, WIDTH, seed=2)
    (our_y * towards).sum().backward()
    (their_y * towards).sum().backward()
    assert_equal_to_rounding(our_x.grad, their_x.grad)
    assert_equal_to_rounding(gate.network.weight.grad, theirs.gate.weight.grad)
    for index, expert in enumerate(our_experts):
        assert_equal_to_rounding(expert.gate_up.weight.grad, theirs.experts.gate_up_proj.grad[index])
        assert_equal_to_rounding(expert.down.weight.grad, theirs.experts.down_proj.grad[index])
