import pytest
import torch
from torch import nn

from distmoe.config import parse_config
from distmoe.contracts import DataSpec
from distmoe.models import build_model
from distmoe.training.cost import measure_cost

SPEC = DataSpec("little", (3, 8, 8), 5, tuple("abcde"), (100.0,) * 3, (50.0,) * 3)


def cost(model: dict, moe: dict | None = None):
    return measure_cost(build_model(parse_config({"model": model, "moe": moe}, "test"), SPEC), SPEC)


CONVNET = {"name": "convnet", "widths": [4], "ffn_stages": [1], "ffn_hidden": 6}

# Two operations a multiply-add. The stem on 8 x 8 pixels: 2 * 64 * 27 * 4; conv1 likewise: 2 * 64 * 36 * 4; conv2 on
# the pooled 4 x 4: 2 * 16 * 36 * 4; the head: 2 * 4 * 5.
TRUNK_FLOPS = 13_824 + 18_432 + 4_608 + 40
# Stem 27 * 4 + 4, two convolutions of 36 * 4, two batch norms and a layer norm of 8, head 4 * 5.
TRUNK_PARAMETERS = 112 + 2 * 144 + 3 * 8 + 20
EXPERT_PARAMETERS = 4 * 6 + 6 + 6 * 4 + 4
EXPERT_FLOPS = 2 * (4 * 6 + 6 * 4)  # of one position


def test_a_dense_convnet():
    measured = cost(CONVNET)
    assert measured.num_parameters == TRUNK_PARAMETERS + EXPERT_PARAMETERS
    assert measured.num_active_parameters == measured.num_parameters
    assert measured.active_flops_per_image == TRUNK_FLOPS + 16 * EXPERT_FLOPS


@pytest.mark.parametrize("k", [1, 2, 8])
def test_of_a_sparse_convnet_only_the_chosen_experts_are_active(k):
    measured = cost(CONVNET, {"num_experts": 8, "gate": {"name": "topk", "k": k, "renormalize": False}})
    gate = 4 * 8
    assert measured.num_parameters == TRUNK_PARAMETERS + gate + 8 * EXPERT_PARAMETERS
    assert measured.num_active_parameters == TRUNK_PARAMETERS + gate + k * EXPERT_PARAMETERS
    assert measured.active_flops_per_image == TRUNK_FLOPS + 16 * (2 * gate + k * EXPERT_FLOPS)


def test_a_dense_gate_makes_all_experts_work():
    model = {"name": "tutorial", "channels": [4], "hidden": 6, "gate_channels": [2], "gate_hidden": 3}
    measured = cost(model, {"num_experts": 3, "gate": {"name": "dense"}})
    # An expert: convolution 27 * 4 + 4 on 64 pixels, linear 4 * 16 -> 6 -> 5. The gate: 27 * 2 + 2, 2 * 16 -> 3 -> 3.
    expert, gate = 112 + 64 * 6 + 6 + 30 + 5, 56 + 32 * 3 + 3 + 9 + 3
    assert measured.num_parameters == measured.num_active_parameters == 3 * expert + gate
    expert_flops, gate_flops = 2 * (64 * 108 + 384 + 30), 2 * (64 * 54 + 96 + 9)
    assert measured.active_flops_per_image == 3 * expert_flops + gate_flops


def test_a_shared_expert_is_always_active():
    measured = cost(CONVNET, {"num_experts": 8, "shared_hidden": 5, "gate": {"name": "topk", "k": 2}})
    gate, shared = 4 * 8, 4 * 5 + 5 + 5 * 4 + 4
    assert measured.num_parameters == TRUNK_PARAMETERS + gate + 8 * EXPERT_PARAMETERS + shared
    assert measured.num_active_parameters == TRUNK_PARAMETERS + gate + 2 * EXPERT_PARAMETERS + shared
    assert measured.active_flops_per_image == TRUNK_FLOPS + 16 * (2 * gate + 2 * EXPERT_FLOPS + 2 * (20 + 20))


def test_of_expert_choice_the_average_is_active():
    # Of an image's 16 positions each of 4 experts takes ceil(1.5 * 16 / 4) = 6.
    measured = cost(CONVNET, {"num_experts": 4, "gate": {"name": "expert_choice", "capacity_factor": 1.5}})
    gate = 4 * 4
    assert measured.num_active_parameters == TRUNK_PARAMETERS + gate + 1.5 * EXPERT_PARAMETERS
    assert measured.active_flops_per_image == TRUNK_FLOPS + 16 * 2 * gate + 4 * 6 * EXPERT_FLOPS


def test_soft_moe_uses_all_experts_but_works_on_slots():
    measured = cost(CONVNET, {"num_experts": 3, "gate": {"name": "soft", "network": {"name": "linear"}}})
    gate = 4 * 3
    assert measured.num_parameters == TRUNK_PARAMETERS + gate + 3 * EXPERT_PARAMETERS
    assert measured.num_active_parameters == measured.num_parameters
    # One slot an expert: 16 positions of 4 values mixed into 3 slots, and 3 slots back into 16 positions.
    mixing = 2 * 16 * 3 * 4
    assert measured.active_flops_per_image == TRUNK_FLOPS + 16 * 2 * gate + 2 * mixing + 3 * EXPERT_FLOPS


def test_an_attentive_gate_asks_all_experts_also_where_it_uses_one():
    gate_section = {"name": "attentive", "width": 2, "k": 1}
    measured = cost(CONVNET, {"num_experts": 3, "gate": gate_section})
    network, query, key = 4 * 2, 2 * 2, 6 * 2
    assert measured.num_parameters == TRUNK_PARAMETERS + network + query + key + 3 * EXPERT_PARAMETERS
    assert measured.num_active_parameters == measured.num_parameters
    # For each position: the query, and for each expert its key and their product of 2 values.
    gate_flops = 2 * (network + query + 3 * (key + 2))
    assert measured.active_flops_per_image == TRUNK_FLOPS + 16 * (gate_flops + 3 * EXPERT_FLOPS)


def test_of_a_mixture_of_classifiers_only_the_chosen_ones_are_active():
    model = {"name": "tutorial", "channels": [4], "hidden": 6, "gate_channels": [2], "gate_hidden": 3}
    measured = cost(model, {"num_experts": 3, "gate": {"name": "dense", "k": 2}})
    expert, gate = 112 + 64 * 6 + 6 + 30 + 5, 56 + 32 * 3 + 3 + 9 + 3
    assert (measured.num_parameters, measured.num_active_parameters) == (3 * expert + gate, 2 * expert + gate)
    expert_flops, gate_flops = 2 * (64 * 108 + 384 + 30), 2 * (64 * 54 + 96 + 9)
    assert measured.active_flops_per_image == 2 * expert_flops + gate_flops


def test_experts_without_their_gate_beside_them_are_not_passed_over():
    model = build_model(parse_config({"model": CONVNET, "moe": {"num_experts": 3}}, "test"), SPEC)
    layer = model.ffns["1"].ffn
    layer.experts, layer.moved = nn.Identity(), nn.ModuleDict({"elsewhere": layer.experts})
    layer.forward = lambda x, context: (x, None)
    with pytest.raises(ValueError, match="1 gates and 0 experts"):
        measure_cost(model, SPEC)


def test_measuring_leaves_mode_statistics_and_random_numbers_alone():
    model = build_model(parse_config({"model": CONVNET}, "test"), SPEC).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    measure_cost(model, SPEC)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())
