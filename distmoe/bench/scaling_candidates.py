"""What ``bench scaling`` compares: one mixture of MLPs whose experts are spread over processes, in two ways."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from distmoe.bench.layer_candidates import Problem, Shape, gate_network
from distmoe.moe.experts import MLPExperts
from distmoe.moe.gates.topk import TopKGate
from distmoe.moe.grouped import Weights
from distmoe.moe.layer import MoELayer
from distmoe.parallel.collectives import Communicators
from distmoe.parallel.expert_parallel import expert_placement
from distmoe.parallel.mesh import Mesh
from distmoe.parallel.shards import expert_parameters


@dataclass(frozen=True)
class Point:
    """One comparison.

    Attributes:
        width: D, values of a token.
        hidden: H, hidden units of an expert.
        num_experts: E.
        k: Experts a token.
        num_tokens: Of all ranks.
        world_size: Number of processes.
        expert_parallel_size: Processes that share one copy of the experts.
    """

    width: int
    hidden: int
    num_experts: int
    k: int
    num_tokens: int
    world_size: int
    expert_parallel_size: int

    @property
    def local_tokens(self) -> int:
        """Of one rank."""
        return self.num_tokens // self.world_size

    @property
    def local_experts(self) -> int:
        """Of one rank."""
        return self.num_experts // self.expert_parallel_size

    def expert_ids(self) -> Tensor:
        """(local tokens, k) experts of each token, the same on every rank.

        The load is even on every rank, so that nobody has to pad, and every pair of experts is as frequent as any other
        up to rounding, so that experts of one token lie on one rank as often as chance has it.
        """
        tokens, choices = torch.arange(self.local_tokens)[:, None], torch.arange(self.k)
        first, others = tokens % self.num_experts, max(self.num_experts - 1, 1)
        offsets = torch.where(choices == 0, 0, 1 + (tokens // self.num_experts + choices - 1) % others)
        return (first + offsets) % self.num_experts

    def least_bytes(self) -> int:
        """That must leave the ranks in a step: each token once to each other rank that it needs, and once back.

        In float32, of all ranks, forward and backward.
        """
        pairs = 0
        for rank in range(self.expert_parallel_size):
            needed = torch.div(self.expert_ids(), self.local_experts, rounding_mode="floor")
            pairs += sum(
                int((needed == other).any(1).sum()) for other in range(self.expert_parallel_size) if other != rank
            )
        replicas = self.world_size // self.expert_parallel_size
        return replicas * pairs * 4 * self.width * torch.float32.itemsize


@dataclass
class Watch:
    """What is spent on exchanges; pass it where :data:`distmoe.parallel.collectives.Observe` is asked for.

    Attributes:
        seconds: In exchanges, waiting for others included.
        sent_bytes: In exchanges of rows, to other ranks.
    """

    seconds: float = field(default=0.0)
    sent_bytes: float = field(default=0.0)

    @contextmanager
    def __call__(self, what: str, num_bytes: int) -> Iterator[None]:
        """Around an exchange."""
        start = time.perf_counter()
        yield
        if "expert-parallel" in what:
            self.seconds += time.perf_counter() - start
            if "all-to-all" in what:
                self.sent_bytes += num_bytes


@dataclass(frozen=True)
class Candidate:
    """One way of computing it.

    Attributes:
        module: Holds its parameters.
        forward: Tokens (T, D) to outputs (T, D).
        experts: The parameters of the experts on this rank.
        first_weights: Gradients (L, D, H) of the experts' first matrices, after a backward pass.
        gate: Its weight (E, D).
        watch: Of its exchanges.
    """

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    experts: list[nn.Parameter]
    first_weights: Callable[[], Tensor]
    gate: Tensor
    watch: Watch


def build_problem(point: Point, mesh: Mesh) -> Problem:
    """This rank's tokens, other ones on each rank, and its experts' weights, the same on all their replicas."""
    generator = torch.Generator().manual_seed(mesh.rank)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    # Logits of the chosen experts lie above 2 and 0.4 apart, the others' between 0 and 1.
    tokens = normal(point.local_tokens, point.width)
    noise = torch.rand(point.local_tokens, point.num_experts, generator=generator)
    above = 2.0 + 0.5 * torch.arange(point.k, 0, -1) + 0.1 * noise[:, : point.k]
    tokens[:, : point.num_experts] = noise.scatter(1, point.expert_ids(), above)
    tokens = tokens[torch.randperm(point.local_tokens, generator=generator)]
    local = mesh.local_experts(point.num_experts)
    weights = []
    sizes: list[tuple[int, ...]] = [
        (point.width, point.hidden),
        (point.hidden,),
        (point.hidden, point.width),
        (point.width,),
    ]
    for size in sizes:
        of_expert = (torch.Generator().manual_seed(1000 + expert) for expert in local)
        weights.append(torch.stack([torch.randn(size, generator=one) * size[0] ** -0.5 for one in of_expert]))
    shape = Shape(point.width, point.hidden, point.num_experts, point.k, "balanced", point.local_tokens)
    return Problem(
        shape,
        tokens.requires_grad_(),
        normal(point.local_tokens, point.width),
        torch.eye(point.num_experts, point.width),
        Weights(*weights),
    )


def our_layer(problem: Problem, mesh: Mesh, watch: Watch) -> Candidate:
    """``MoELayer`` with ``AllToAllDispatcher`` and ``MLPExperts``. Collective."""
    shape = problem.shape
    placement = expert_placement(Communicators.of(mesh, observe=watch))
    gate = TopKGate(gate_network(problem), shape.num_experts, shape.k, renormalize=shape.k > 1)
    experts = MLPExperts(placement.local_experts(shape.num_experts), shape.width, shape.hidden)
    with torch.no_grad():
        for own, given in zip((experts.w1, experts.b1, experts.w2, experts.b2), problem.weights, strict=True):
            own.copy_(given)
    layer = MoELayer(gate, experts, placement)
    (gate_weight,) = gate.parameters()
    return Candidate(
        layer,
        lambda x: layer(x)[0],
        expert_parameters(layer),
        lambda: _gradient(experts.w1),
        gate_weight,
        watch,
    )


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "there was no backward pass"
    return parameter.grad
