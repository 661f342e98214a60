import dataclasses

import torch.distributed as dist

from distmoe.config import parse_config
from distmoe.contracts import DataSpec
from distmoe.models import build_model
from distmoe.parallel.collectives import Communicators
from distmoe.parallel.expert_parallel import expert_placement
from distmoe.parallel.mesh import Mesh
from distmoe.training.cost import measure_cost
from tests.distributed.ranks import run_ranks

SPEC = DataSpec("little", (3, 8, 8), 5, tuple("abcde"), (100.0,) * 3, (50.0,) * 3)
CONVNET = {"name": "convnet", "widths": [4], "ffn_stages": [1], "ffn_hidden": 6}
TUTORIAL = {"name": "tutorial", "channels": [4], "hidden": 6, "gate_channels": [2], "gate_hidden": 3}
CASES = {
    "top-2": {"model": CONVNET, "moe": {"num_experts": 4, "shared_hidden": 5, "gate": {"name": "topk", "k": 2}}},
    "expert choice": {"model": CONVNET, "moe": {"num_experts": 4, "gate": {"name": "expert_choice"}}},
    "soft": {"model": CONVNET, "moe": {"num_experts": 4, "gate": {"name": "soft"}}},
    "attentive": {"model": CONVNET, "moe": {"num_experts": 4, "gate": {"name": "attentive", "width": 2, "k": 1}}},
    "classifiers": {"model": TUTORIAL, "moe": {"num_experts": 4, "gate": {"name": "dense", "k": 2}}},
}


def sharded_costs() -> dict[str, tuple[int, int, int]]:
    costs = {}
    for size in (1, 2, 4):
        communicators = Communicators.of(Mesh(dist.get_world_size(), dist.get_rank(), size))
        placement = expert_placement(communicators)
        for name, sections in CASES.items():
            module = build_model(parse_config(sections, "test"), SPEC, placement)
            cost = measure_cost(module, SPEC, reducer=placement.reducer)
            costs[f"{name} {size}"] = dataclasses.astuple(cost)
    return costs


def test_spread_experts_cost_exactly_what_they_cost_in_one_process():
    whole = {
        name: dataclasses.astuple(measure_cost(build_model(parse_config(sections, "test"), SPEC), SPEC))
        for name, sections in CASES.items()
    }
    for costs in run_ranks(sharded_costs, 4):
        for case, cost in costs.items():
            assert cost == whole[case.rsplit(" ", 1)[0]], case
        assert len(costs) == 3 * len(CASES)
