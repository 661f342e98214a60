"""Batch norm over ranks against torch's own on all rows."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from distmoe.models.convnet import BatchNorm
from distmoe.moe.experts import ModuleExperts
from distmoe.moe.gates.topk import TopKGate
from distmoe.moe.layer import MoELayer
from distmoe.parallel.batch_norm import SharedBatchNorm, share_batch_statistics
from tests.distributed.coupled import Case, Pairs, Ranks, context, gradient_pairs, take_share, values

CHANNELS = 3


def started(norm: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """With weights, biases and running statistics of its own."""
    for number, tensor in enumerate([*norm.parameters(), *norm.buffers()]):
        if tensor.is_floating_point():
            tensor.data.copy_(1.0 + 0.3 * values(*tensor.shape, seed=number + 50).abs())
    return norm.to(dtype)


def norm_pairs(ranks: Ranks, norm: nn.Module, x: Tensor, training: bool = True, autocast: bool = False) -> Pairs:
    """Two passes with gradients through both norms, then one in evaluation."""
    ours = share_batch_statistics(copy.deepcopy(norm), ranks.world)
    assert isinstance(ours, SharedBatchNorm)
    pairs: Pairs = {}
    norm.train(training)
    ours.train(training)
    scale = float(len(ranks.rows))
    for step in range(2):
        x = x + step
        whole, part = x.clone().requires_grad_(), x[ranks.own].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected, got = norm(whole), ours(part)
        towards = values(*x.shape, seed=step + 7, dtype=expected.dtype)
        (expected * towards).sum().backward()
        (got * towards[ranks.own]).sum().mul(scale).backward()
        assert whole.grad is not None
        assert part.grad is not None
        pairs[f"output {step}"] = (got, expected[ranks.own])
        pairs[f"gradient of the input {step}"] = (part.grad / scale, whole.grad[ranks.own])
    pairs |= gradient_pairs(ours, norm, ranks.world)
    theirs = dict(norm.named_buffers())
    assert list(dict(ours.named_buffers())) == list(theirs)
    pairs |= {f"buffer {name}": (buffer, theirs[name]) for name, buffer in ours.named_buffers()}
    pairs |= {
        f"{name} on all ranks": (on_all(ranks, buffer), on_all(ranks, theirs[name])) for name, buffer in theirs.items()
    }
    if theirs:
        norm.eval()
        ours.eval()
        pairs["evaluation"] = (ours(x[ranks.own]), norm(x)[ranks.own])
    return pairs


def on_all(ranks: Ranks, tensor: Tensor) -> Tensor:
    return ranks.world.world.gather_equal(tensor)


def norm_case(
    make: Callable[[], nn.Module], *shape: int, dtype: torch.dtype = torch.float64, mean: float = 0.5
) -> Case:
    """A norm on rows of this shape."""

    def case(ranks: Ranks) -> Pairs:
        x = values(sum(ranks.rows), CHANNELS, *shape, dtype=dtype) * 2.0 + mean
        return norm_pairs(ranks, started(make(), dtype), x)

    return case


def channels_last(ranks: Ranks) -> Pairs:
    x = values(sum(ranks.rows), CHANNELS, 4, 5).contiguous(memory_format=torch.channels_last)
    return norm_pairs(ranks, started(nn.BatchNorm2d(CHANNELS)), x)


def half_precision(ranks: Ranks) -> Pairs:
    x = values(sum(ranks.rows), CHANNELS, 4, dtype=torch.bfloat16) + 3.0
    return norm_pairs(ranks, started(nn.BatchNorm1d(CHANNELS), torch.float32), x, autocast=True)


def evaluation_without_running_statistics(ranks: Ranks) -> Pairs:
    norm = started(nn.BatchNorm1d(CHANNELS, track_running_stats=False))
    return norm_pairs(ranks, norm, values(sum(ranks.rows), CHANNELS, 2), training=False)


def two_values_on_two_ranks(ranks: Ranks) -> Pairs:
    """One row here, one there: a rank alone would have no variance."""
    few = ranks.with_rows(1, 1)
    return norm_pairs(few, started(nn.BatchNorm1d(CHANNELS)), values(2, CHANNELS))


def too_few_values(num_rows: int, ranks: Ranks) -> Pairs:
    """The project's own norm of a single process is the oracle: torch's raises, or makes running statistics of NaN."""
    few = ranks.with_rows(0, num_rows)
    x = values(num_rows, CHANNELS, 1, 1)
    return norm_pairs(few, started(BatchNorm(CHANNELS)), x)


def one_value_without_running_statistics(ranks: Ranks) -> Pairs:
    norm = share_batch_statistics(started(nn.BatchNorm1d(CHANNELS, track_running_stats=False)), ranks.world)
    few = ranks.with_rows(0, 1)
    got = norm(values(1, CHANNELS)[few.own])
    assert isinstance(norm.bias, Tensor)
    return {"output is the bias": (got, norm.bias.expand(1, -1)[few.own])}


class Twice(nn.Module):
    """One norm under two names, and in between what is no batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(CHANNELS)
        self.inner = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.LayerNorm(CHANNELS))
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.again(self.inner(self.first(x)))
        return result


def one_norm_in_two_places(ranks: Ranks) -> Pairs:
    torch.manual_seed(0)
    whole = Twice().double()
    ours = share_batch_statistics(copy.deepcopy(whole), ranks.world)
    assert ours.first is ours.again
    x, towards = values(sum(ranks.rows), CHANNELS), values(sum(ranks.rows), CHANNELS, seed=2)
    expected, got = whole(x), ours(x[ranks.own])
    (expected * towards).sum().backward()
    (got * towards[ranks.own]).sum().mul(len(ranks.rows)).backward()
    pairs: Pairs = {"output": (got, expected[ranks.own])} | gradient_pairs(ours, whole, ranks.world)
    return pairs | {key: (ours.state_dict()[key], value) for key, value in whole.state_dict().items()}


def inside_experts(expert_parallel_size: int, ranks: Ranks) -> Pairs:
    """Statistics of the rows that an expert has on all its replicas; in front of the gate, of all rows."""
    num_experts = 4

    def layer(ids: range) -> MoELayer:
        network = nn.Sequential(nn.BatchNorm1d(CHANNELS), nn.Linear(CHANNELS, num_experts))
        gate = TopKGate(network, num_experts, k=2)
        experts = ModuleExperts(
            ids, lambda: nn.Sequential(nn.Linear(CHANNELS, 4), BatchNorm1dOfAny(4), nn.Linear(4, 2))
        )
        return MoELayer(gate, experts, None if len(ids) == num_experts else placement).double()

    placement, communicators = ranks.placement(expert_parallel_size), ranks.communicators[expert_parallel_size]
    torch.manual_seed(0)
    whole, ours = layer(range(num_experts)), layer(placement.local_experts(num_experts))
    take_share(ours, whole)
    share_batch_statistics(ours, communicators)
    x, towards = values(sum(ranks.rows), CHANNELS), values(sum(ranks.rows), 2, seed=2)
    expected, got = whole(x, context(slice(0, len(x))))[0], ours(x[ranks.own], context(ranks.own))[0]
    (expected * towards).sum().backward()
    (got * towards[ranks.own]).sum().mul(len(ranks.rows)).backward()
    pairs: Pairs = {"output": (got, expected[ranks.own])} | gradient_pairs(ours, whole, communicators)
    theirs = dict(whole.named_buffers())
    return pairs | {f"buffer {name}": (buffer, theirs[name]) for name, buffer in ours.named_buffers()}


class BatchNorm1dOfAny(nn.BatchNorm1d):
    """In one process as :class:`distmoe.models.convnet.BatchNorm`, for an expert that gets fewer than two rows."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) < 2:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(x)


NORMS: dict[str, Case] = {
    "rows of features": norm_case(lambda: nn.BatchNorm1d(CHANNELS)),
    "sequences": norm_case(lambda: nn.BatchNorm1d(CHANNELS, momentum=0.3, eps=0.1), 4),
    "images": norm_case(lambda: nn.BatchNorm2d(CHANNELS), 4, 5),
    "images of the convnet": norm_case(lambda: BatchNorm(CHANNELS), 4, 5),
    "volumes": norm_case(lambda: nn.BatchNorm3d(CHANNELS), 2, 3, 2),
    "float32": norm_case(lambda: nn.BatchNorm2d(CHANNELS), 4, 5, dtype=torch.float32),
    "channels last": channels_last,
    "half precision": half_precision,
    "no weights": norm_case(lambda: nn.BatchNorm2d(CHANNELS, affine=False), 2, 2),
    "cumulative average": norm_case(lambda: nn.BatchNorm2d(CHANNELS, momentum=None), 2, 2),
    "no running statistics": norm_case(lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False), 2, 2),
    "no running statistics in evaluation": evaluation_without_running_statistics,
    "two values on two ranks": two_values_on_two_ranks,
    "one value": partial(too_few_values, 1),
    "no value": partial(too_few_values, 0),
    "one value and no running statistics": one_value_without_running_statistics,
    "one norm in two places": one_norm_in_two_places,
    "inside experts on every rank": partial(inside_experts, 1),
    "inside experts spread over two": partial(inside_experts, 2),
}
