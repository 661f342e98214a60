"""Whatever couples tokens gives on several ranks what one process gives from all of them: gates, losses, statistics."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distmoe.config import parse_config
from distmoe.contracts import Context, DataSpec
from distmoe.models import build_model
from distmoe.moe.balance import Balancer, LossFreeBias, RunningTotals
from distmoe.moe.experts import MLPExperts
from distmoe.moe.gates.base import Gate
from distmoe.moe.gates.dense import DenseGate
from distmoe.moe.gates.expert_choice import ExpertChoiceGate
from distmoe.moe.gates.filters import FilterGate
from distmoe.moe.gates.noisy import NoisyTopKGate
from distmoe.moe.gates.sigmoid import SigmoidGate
from distmoe.moe.gates.soft import SoftGate
from distmoe.moe.gates.topk import SwitchGate, TopKGate
from distmoe.moe.layer import MoELayer
from distmoe.moe.losses import AuxiliaryLoss, ImportanceLoss, LoadBalanceLoss, LoadLoss, SimilarityLoss, ZLoss
from distmoe.moe.measures import routing_sums
from distmoe.moe.sums import add_sums, no_reduction
from distmoe.parallel.batch_norm import share_batch_statistics
from distmoe.parallel.collectives import Communicators
from distmoe.parallel.mesh import Mesh
from tests.distributed.batch_norm_cases import NORMS
from tests.distributed.coupled import (
    Case,
    Pairs,
    Ranks,
    context,
    differences,
    gradient_pairs,
    take_share,
    values,
)
from tests.distributed.ranks import run_ranks
from tests.unit.moe.gate_forms import Given

NUM_EXPERTS, WIDTH = 5, 3


# --- Choices: the same assignments, bit for bit


def choices_of(make: Callable[[], Gate], ranks: Ranks, num_outputs: int = NUM_EXPERTS) -> Pairs:
    """Of tokens that are the logits, some of which are equal: ties go by position, over ranks as well."""
    logits = (values(sum(ranks.rows), num_outputs, dtype=torch.float32) * 2.0).round() / 2.0
    whole = make().route(logits, context(slice(0, len(logits))))
    gate = make()
    gate.reducer = ranks.reducer
    own = gate.route(logits[ranks.own], context(ranks.own))
    assert whole.weights_A is not None
    assert own.weights_A is not None
    here = (whole.row_ids_A >= ranks.own.start) & (whole.row_ids_A < ranks.own.stop)
    pairs = {
        "rows": (own.row_ids_A, whole.row_ids_A[here] - ranks.own.start),
        "experts": (own.expert_ids_A, whole.expert_ids_A[here]),
        "weights": (own.weights_A.view(torch.int32), whole.weights_A[here].view(torch.int32)),
    }
    sums, expected = ranks.reducer(routing_sums(own)), routing_sums(whole)
    return pairs | {name: (sums[name], value) for name, value in expected.items()}


def choice_case(make: Callable[[], Gate], num_outputs: int = NUM_EXPERTS, rows: tuple[int, ...] | None = None) -> Case:
    def case(ranks: Ranks) -> Pairs:
        return choices_of(make, ranks if rows is None else ranks.with_rows(*rows), num_outputs)

    return case


def top_2(**settings: Any) -> Gate:
    return TopKGate(Given(), NUM_EXPERTS, k=2, group="batch", **settings)


CHOICES: dict[str, Case] = {
    "capacity by position": choice_case(lambda: top_2(capacity_factor=0.7)),
    "capacity by score": choice_case(lambda: top_2(capacity_factor=0.7, priority="score")),
    "capacity for all": choice_case(lambda: top_2(capacity_factor=5.0)),
    "capacity of one row": choice_case(lambda: top_2(capacity_factor=0.7), rows=(0, 1)),
    "capacity of no row": choice_case(lambda: top_2(capacity_factor=0.7, priority="score"), rows=(0, 0)),
    "capacity of a switch": choice_case(
        lambda: SwitchGate(Given(), NUM_EXPERTS, jitter=0.2, capacity_factor=1.0, group="batch")
    ),
    "capacity and noise": choice_case(
        lambda: NoisyTopKGate(Given(), NUM_EXPERTS, capacity_factor=0.8, group="batch"), 2 * NUM_EXPERTS
    ),
    "capacity of sigmoids": choice_case(
        lambda: SigmoidGate(Given(), NUM_EXPERTS, scale=2.5, capacity_factor=0.6, group="batch", priority="score")
    ),
    "capacity of each image": choice_case(lambda: TopKGate(Given(), NUM_EXPERTS, capacity_factor=0.5)),
    "expert choice": choice_case(lambda: ExpertChoiceGate(Given(), NUM_EXPERTS, 1.3, "batch")),
    "expert choice of all": choice_case(lambda: ExpertChoiceGate(Given(), NUM_EXPERTS, 5.0, "batch")),
    "expert choice of one row": choice_case(lambda: ExpertChoiceGate(Given(), NUM_EXPERTS, 1.0, "batch"), rows=(0, 1)),
    "expert choice of no row": choice_case(lambda: ExpertChoiceGate(Given(), NUM_EXPERTS, 1.0, "batch"), rows=(0, 0)),
}


# --- Layers: outputs and gradients


def layer_of(make: Callable[[nn.Module, int], Gate], columns: int, size: int, num_experts: int, ranks: Ranks) -> Pairs:
    """A whole layer, its experts spread over ``size`` ranks."""
    placement = ranks.placement(size)

    def layer(ids: range, **where: Any) -> MoELayer:
        gate = make(nn.Linear(WIDTH, columns), num_experts)
        return MoELayer(gate, MLPExperts(ids, WIDTH, 4), **where).double()

    torch.manual_seed(0)
    whole = layer(range(num_experts))
    for parameter in whole.parameters():
        nn.init.normal_(parameter)
    local = layer(placement.local_experts(num_experts), placement=placement)
    take_share(local, whole)
    x, towards = values(sum(ranks.rows), WIDTH), values(sum(ranks.rows), WIDTH, seed=2)
    everything, part = x.clone().requires_grad_(), x[ranks.own].clone().requires_grad_()
    expected, whole_routing = whole(everything, context(slice(0, len(x))))
    got, routing = local(part, context(ranks.own))
    (expected * towards).sum().backward()
    (got * towards[ranks.own]).sum().mul(len(ranks.rows)).backward()
    assert everything.grad is not None
    assert part.grad is not None
    pairs: Pairs = {
        "output": (got, expected[ranks.own]),
        "gradient of the input": (part.grad / len(ranks.rows), everything.grad[ranks.own]),
    }
    sums, of_whole = ranks.reducer(routing_sums(routing)), routing_sums(whole_routing)
    pairs |= {name: (sums[name], value) for name, value in of_whole.items()}
    if routing.mixing is not None:
        slots = ranks.world.world.gather_equal(torch.tensor(len(routing.row_ids_A)))
        pairs["slots that one rank has more than another"] = ((slots.max() - slots.min()).clamp(min=1), torch.tensor(1))
    return pairs | gradient_pairs(local, whole, ranks.communicators[size])


def soft(slots: int) -> Callable[[nn.Module, int], Gate]:
    return lambda network, num_experts: SoftGate(network, num_experts, slots, "batch")


def soft_layer(slots: int, size: int, num_experts: int, ranks: Ranks) -> Pairs:
    return layer_of(soft(slots), slots * num_experts, size, num_experts, ranks)


def far_apart(network: nn.Module, num_experts: int) -> Gate:
    """Logits whose exponentials overflow, unless the largest of all ranks is subtracted."""
    return SoftGate(nn.Sequential(network, Times(700.0)), num_experts, 1, "batch")


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def prioritised(network: nn.Module, num_experts: int) -> Gate:
    return TopKGate(network, num_experts, capacity_factor=0.7, group="batch", priority="score")


def by_experts(network: nn.Module, num_experts: int) -> Gate:
    return ExpertChoiceGate(network, num_experts, 1.5, "batch")


LAYERS: dict[str, Case] = {
    "soft, five slots": partial(soft_layer, 1, 1, 5),
    "soft, fewer slots than ranks": partial(soft_layer, 1, 1, 1),
    "soft, experts spread": partial(soft_layer, 3, 2, 4),
    "soft, large logits": partial(layer_of, far_apart, 5, 1, 5),
    "soft, one row": lambda ranks: soft_layer(2, 2, 4, ranks.with_rows(0, 1)),
    "soft, no row": lambda ranks: soft_layer(2, 2, 4, ranks.with_rows(0, 0)),
    "capacity": partial(layer_of, prioritised, 4, 2, 4),
    "expert choice": partial(layer_of, by_experts, 4, 2, 4),
}


# --- Losses and balancers


def loss_of(
    make: Callable[[nn.Module], Gate], columns: int, loss: AuxiliaryLoss, dtype: torch.dtype, ranks: Ranks
) -> Pairs:
    """Value, and gradient where every rank back-propagates the same scalar and gradients are averaged."""
    x = values(sum(ranks.rows), WIDTH, dtype=dtype)
    images = torch.randint(0, 256, (len(x), 2, 3), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    network = nn.Linear(WIDTH, columns, dtype=dtype)
    gate = make(network)
    nn.init.normal_(network.weight, generator=torch.Generator().manual_seed(3))
    nn.init.normal_(network.bias, generator=torch.Generator().manual_seed(5))
    expected = loss.value(gate.route(x, context(slice(0, len(x)))), images, no_reduction)
    gradients = torch.autograd.grad(expected, [network.weight, network.bias])
    got = loss.value(gate.route(x[ranks.own], context(ranks.own)), images[ranks.own], ranks.reducer)
    got.backward()
    pairs: Pairs = {"value": (got, expected)}
    for name, parameter, gradient in zip(("weight", "bias"), (network.weight, network.bias), gradients, strict=True):
        assert parameter.grad is not None
        mean = ranks.world.world.sum_(parameter.grad) / len(ranks.rows)
        pairs[f"gradient of {name}"] = (mean, gradient)
    return pairs


def noisy(network: nn.Module) -> Gate:
    return NoisyTopKGate(network, NUM_EXPERTS)


def per_filter(network: nn.Module) -> Gate:
    return FilterGate(network, NUM_EXPERTS, "softmax", (2,))


def with_capacity(network: nn.Module) -> Gate:
    return TopKGate(network, NUM_EXPERTS, capacity_factor=0.5)


LOSSES: dict[str, AuxiliaryLoss] = {
    "load balance": LoadBalanceLoss(),
    "importance": ImportanceLoss(),
    "z": ZLoss(),
    **{
        f"similarity {pairs}, {form}, {distance}": SimilarityLoss(pairs, form, distance)
        for pairs in ("within", "between")
        for form in ("paper", "authors")
        for distance in ("pixels", "tokens")
    },
}
LOSS_CASES: dict[str, Case] = {
    f"{name}, {gate}, {str(dtype).removeprefix('torch.')}": partial(loss_of, make, columns, loss, dtype)
    for name, loss in LOSSES.items()
    for gate, make, columns in (("per filter", per_filter, 2 * NUM_EXPERTS), ("top-k", with_capacity, NUM_EXPERTS))
    for dtype in (torch.float64, torch.float32)
} | {"load, noisy top-k": partial(loss_of, noisy, 2 * NUM_EXPERTS, LoadLoss(), torch.float64)}


def balancer_of(make: Callable[[], Gate], ranks: Ranks) -> Pairs:
    """Three steps of two micro-batches each; later choices depend on earlier updates."""
    gate, whole = make(), make()
    balancers = gate.balancer, whole.balancer
    for step in range(3):
        reduced: list[dict[str, Tensor]] = [{}, {}]
        for number in range(2):
            x = values(sum(ranks.rows), NUM_EXPERTS, seed=10 * step + number)
            own, everything = context(ranks.own), context(slice(0, len(x)))
            for one, balancer, totals, routing in zip(
                (gate, whole),
                balancers,
                reduced,
                (gate.route(x[ranks.own], own), whole.route(x, everything)),
                strict=True,
            ):
                assert isinstance(balancer, Balancer), one
                add_sums(totals, balancer.sums(routing))
        for balancer, sums in zip(balancers, (ranks.reducer(reduced[0]), reduced[1]), strict=True):
            assert isinstance(balancer, Balancer)
            balancer.update(sums)
    assert isinstance(balancers[0], LossFreeBias | RunningTotals)
    theirs = dict(whole.named_buffers())
    pairs: Pairs = {name: (buffer, theirs[name]) for name, buffer in gate.named_buffers()}
    on_all = {name: ranks.world.world.gather_equal(buffer) for name, buffer in gate.named_buffers()}
    return pairs | {f"{name} on all ranks": (each, each[:1].expand_as(each)) for name, each in on_all.items()}


BALANCERS: dict[str, Case] = {
    "loss-free bias": partial(balancer_of, lambda: SigmoidGate(Given(), NUM_EXPERTS, bias_rate=0.1)),
    "running totals": partial(balancer_of, lambda: DenseGate(Given(), NUM_EXPERTS, margin=0.5)),
}


# --- A whole network

SPEC = DataSpec("little", (3, 8, 8), 4, tuple("abcd"), (100.0,) * 3, (50.0,) * 3)


def network_of(gate: dict[str, Any], ranks: Ranks) -> Pairs:
    """Batch norm, gate and experts together, as the training step has them."""
    model = {"name": "convnet", "widths": [4, 4], "ffn_stages": [1], "ffn_hidden": 5}
    config = parse_config({"model": model, "moe": {"num_experts": 4, "gate": {"group": "batch", **gate}}}, "test")
    whole = build_model(config, SPEC).double()
    local = build_model(config, SPEC, ranks.placement(2)).double()
    share_batch_statistics(local, ranks.communicators[2])
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (sum(ranks.rows), 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (len(images),), generator=generator)
    everything = Context(0, 3, torch.arange(len(images)), training=True)
    expected = whole(images, everything)
    got = local(images[ranks.own], replace(everything, sample_ids=everything.sample_ids[ranks.own]))
    expected.losses(labels).double().mean().backward()
    got.losses(labels[ranks.own]).double().sum().mul(len(ranks.rows) / len(images)).backward()
    pairs: Pairs = {"scores": (got.scores, expected.scores[ranks.own])}
    theirs = dict(whole.named_buffers())
    pairs |= {name: (buffer, theirs[name]) for name, buffer in local.named_buffers()}
    # The losses are float32.
    gradients = gradient_pairs(local, whole, ranks.communicators[2])
    return pairs | {name: (ours.float(), theirs.float()) for name, (ours, theirs) in gradients.items()}


NETWORKS: dict[str, Case] = {
    "network, soft": partial(network_of, {"name": "soft"}),
    "network, top-2": partial(network_of, {"name": "topk", "capacity_factor": 0.8, "priority": "score"}),
    "network, expert choice": partial(network_of, {"name": "expert_choice"}),
}

CASES = {
    **{f"choices: {name}": case for name, case in CHOICES.items()},
    **{f"layer: {name}": case for name, case in LAYERS.items()},
    **{f"loss: {name}": case for name, case in LOSS_CASES.items()},
    **{f"balancer: {name}": case for name, case in BALANCERS.items()},
    **{f"norm: {name}": case for name, case in NORMS.items()},
    **NETWORKS,
}


def all_differences() -> dict[str, list[str]]:
    return differences(CASES)


@pytest.fixture(scope="module", params=[2, 4], ids="{} ranks".format)
def found(request):
    return run_ranks(all_differences, request.param)


@pytest.mark.parametrize("name", CASES)
def test_ranks_get_together_what_one_process_gets(found, name):
    wrong = {rank: each[name] for rank, each in enumerate(found) if each[name]}
    assert not wrong, "\n".join(f"rank {rank}: {one}" for rank, all_ in wrong.items() for one in all_)


def test_the_only_rank_keeps_its_batch_norms():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    norm = net[1]
    assert share_batch_statistics(net, Communicators.of(Mesh())) is net
    assert net[1] is norm
    assert share_batch_statistics(norm, Communicators.of(Mesh())) is norm
