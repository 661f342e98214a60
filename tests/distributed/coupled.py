"""What the cases of tests/distributed/test_coupling.py are made of: ranks with unequal numbers of rows, and pairs of
what they got together and what one process gets from all rows."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmoe.contracts import Context
from distmoe.moe.dispatch import Placement
from distmoe.moe.experts import MLPExperts
from distmoe.moe.sums import Reducer
from distmoe.parallel.collectives import Communicators, SumReducer
from distmoe.parallel.expert_parallel import expert_placement
from distmoe.parallel.gradients import reduce_gradients
from distmoe.parallel.mesh import Mesh

ROWS = {2: (5, 7), 4: (5, 0, 3, 4)}  # of each rank, by world size; 12 in all


@dataclass
class Ranks:
    """One rank among all, and its share of everything.

    Attributes:
        rank: This one.
        rows: Of each rank.
        communicators: By expert-parallel size.
    """

    rank: int
    rows: tuple[int, ...]
    communicators: dict[int, Communicators]

    @staticmethod
    def here() -> "Ranks":
        rank, size = dist.get_rank(), dist.get_world_size()
        sizes = [number for number in (1, 2, 4) if number <= size]
        return Ranks(rank, ROWS[size], {number: Communicators.of(Mesh(size, rank, number)) for number in sizes})

    @property
    def world(self) -> Communicators:
        return self.communicators[1]

    @property
    def reducer(self) -> Reducer:
        return SumReducer(self.world.world)

    @property
    def own(self) -> slice:
        start = sum(self.rows[: self.rank])
        return slice(start, start + self.rows[self.rank])

    def placement(self, expert_parallel_size: int) -> Placement:
        return expert_placement(self.communicators[expert_parallel_size])

    def with_rows(self, *rows: int) -> "Ranks":
        """The same ranks with other numbers of rows, zero where none is given."""
        return Ranks(self.rank, (rows + (0,) * len(self.rows))[: len(self.rows)], self.communicators)


Pairs = dict[str, tuple[Tensor, Tensor]]  # by what it is: on this rank, and what one process says
Case = Callable[[Ranks], Pairs]


def differences(cases: dict[str, Case], ranks: Ranks | None = None) -> dict[str, list[str]]:
    """Where each case goes wrong on this rank. Numbers are compared when all ranks are through with the case."""
    ranks = Ranks.here() if ranks is None else ranks
    found: dict[str, list[str]] = {}
    for name, case in cases.items():
        found[name] = []
        for what, (ours, expected) in case(ranks).items():
            # Exact for whole numbers; else a few roundings of the dtype.
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}.get(expected.dtype, 0.0)
            try:
                torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
            except AssertionError as error:
                found[name].append(f"{what}: {error}")
    return found


def take_share(local: nn.Module, whole: nn.Module) -> None:
    """Gives a module with some of the experts the weights and buffers of one with all of them."""
    tensors = dict(whole.named_parameters()) | dict(whole.named_buffers())
    slices = {
        f"{name}.{key}": part.expert_ids
        for name, part in local.named_modules()
        if isinstance(part, MLPExperts)
        for key, _ in part.named_parameters()
    }
    with torch.no_grad():
        for name, tensor in [*local.named_parameters(), *local.named_buffers()]:
            wanted = tensors[name]
            tensor.copy_(wanted[slices[name].start : slices[name].stop] if name in slices else wanted)


def gradient_pairs(local: nn.Module, whole: nn.Module, communicators: Communicators) -> Pairs:
    """Gradients by parameter, ours reduced by the gradient rule. Collective."""
    reduce_gradients(local, communicators)
    theirs = dict(whole.named_parameters())
    pairs: Pairs = {}
    stacks = {part: name for name, part in local.named_modules() if isinstance(part, MLPExperts)}
    ids = {f"{name}.{key}": part.expert_ids for part, name in stacks.items() for key, _ in part.named_parameters()}
    for name, parameter in local.named_parameters():
        expected = theirs[name].grad
        expected = torch.zeros_like(theirs[name]) if expected is None else expected
        expected = expected[ids[name].start : ids[name].stop] if name in ids else expected
        assert parameter.grad is not None
        pairs[f"gradient of {name}"] = (parameter.grad, expected)
    return pairs


def context(samples: slice, training: bool = True) -> Context:
    """Of one row a sample."""
    return Context(0, 3, torch.arange(samples.start, samples.stop), training)


def values(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal, the same on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
