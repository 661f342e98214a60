import pytest
import torch

from distmoe.config import parse_config
from distmoe.contracts import DataSpec
from distmoe.models import build_model
from distmoe.moe.dispatch import LocalDispatcher
from distmoe.training.cost import measure_cost
from distmoe.training.cost_model import MixtureWork
from distmoe.training.workload import measure_workload

SPEC = DataSpec("little", (3, 8, 8), 5, tuple("abcde"), (100.0,) * 3, (50.0,) * 3)
CONVNET = {"name": "convnet", "widths": [4], "ffn_stages": [1], "ffn_hidden": 6}
TUTORIAL = {"name": "tutorial", "channels": [4], "hidden": 6, "gate_channels": [2], "gate_hidden": 3}
EXPERT = {"expert_parameters": 4 * 6 + 6 + 6 * 4 + 4, "expert_flops": 2 * (4 * 6 + 6 * 4)}


def built(model: dict, gate: dict):
    return build_model(parse_config({"model": model, "moe": {"num_experts": 4, "gate": gate}}, "test"), SPEC)


@pytest.mark.parametrize(
    ("gate", "tokens", "k", "values_out"),
    [
        ({"name": "topk", "k": 2}, 16, 2, 4),  # 4 x 4 positions after the pooling
        ({"name": "dense"}, 16, 4, 4),
        ({"name": "soft"}, 4, 1, 4),  # a slot an expert, and each goes to its own only
        ({"name": "attentive", "width": 2, "k": 1}, 16, 4, 4 + 6),  # hidden states come back beside the outputs
    ],
)
def test_what_a_layer_dispatches(gate: dict, tokens: int, k: int, values_out: int):
    workload = measure_workload(built(CONVNET, gate), SPEC)
    assert workload.mixtures == (MixtureWork(4, tokens, k, values_in=4, values_out=values_out, **EXPERT),)


def test_parts_add_up_to_the_whole():
    model = built(TUTORIAL, {"name": "dense", "k": 2})
    workload, cost = measure_workload(model, SPEC), measure_cost(model, SPEC)
    (mixture,) = workload.mixtures
    assert (mixture.tokens, mixture.k, mixture.values_in, mixture.values_out) == (1, 2, 3 * 8 * 8, 5)
    # The gate: 27 * 2 + 2, 2 * 16 -> 3 -> 4.
    assert workload.dense_parameters == 56 + 32 * 3 + 3 + 3 * 4 + 4
    assert workload.dense_flops == 2 * (64 * 54 + 96 + 12)
    assert workload.dense_parameters + 4 * mixture.expert_parameters == cost.num_parameters
    assert workload.dense_flops + 2 * mixture.expert_flops == cost.active_flops_per_image


def test_kept_values_are_those_that_the_backward_pass_reads_and_operations_those_that_work():
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = torch.nn.Linear(192, 10), torch.nn.Linear(10, 5)

        def forward(self, images: torch.Tensor, context: object) -> torch.Tensor:
            del context
            return self.fc2(torch.relu(self.fc1(images.flatten(1) / 255)))

    # The input, the hidden layer after relu (which keeps the same tensor); no weights, no output.
    workload = measure_workload(Net(), SPEC)
    assert workload.activation_values == 192 + 10
    assert workload.operations == 4  # the quotient, two products with their sums, relu; views are none


def test_measuring_leaves_the_model_as_it_was():
    model = built(CONVNET, {"name": "topk"}).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure_workload(model, SPEC)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model.ffns["1"].ffn.dispatcher) is LocalDispatcher


def test_a_token_that_no_expert_takes_does_not_travel():
    # Each of 4 experts takes ceil(16 / 4 / 2) = 2 of an image's 16 positions: at most half of them.
    (mixture,) = measure_workload(built(CONVNET, {"name": "expert_choice", "capacity_factor": 0.5}), SPEC).mixtures
    assert mixture.tokens <= 8
    assert mixture.tokens * mixture.k == pytest.approx(8)
