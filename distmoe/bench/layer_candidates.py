"""What ``bench layer`` compares: one mixture of MLPs, its tokens and its routing, computed in several ways."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from distmoe.moe.experts import MLPExperts
from distmoe.moe.gates.topk import TopKGate
from distmoe.moe.grouped import Weights
from distmoe.moe.layer import MoELayer

Load = Literal["balanced", "skewed"]


@dataclass(frozen=True)
class Shape:
    """One comparison.

    Attributes:
        width: D, values of a token.
        hidden: H, hidden units of an expert.
        num_experts: E.
        k: Experts a token.
        load: ``balanced``: every expert gets equally many tokens. ``skewed``: one expert gets every token, for k=1 half
            of them, and the others share the rest equally.
        num_tokens: T.
    """

    width: int
    hidden: int
    num_experts: int
    k: int
    load: Load
    num_tokens: int

    @property
    def rows_per_expert(self) -> float:
        """Rows that an expert gets on average."""
        return self.num_tokens * self.k / self.num_experts

    @property
    def most_rows(self) -> int:
        """Rows of the expert that gets most: what a layer pads every expert to that has one size for all."""
        return int(torch.bincount(self.expert_ids().flatten()).max())

    @property
    def padding(self) -> float:
        """How many times more rows a layer works on that pads every expert to the fullest."""
        return self.num_experts * self.most_rows / (self.num_tokens * self.k)

    def expert_ids(self) -> Tensor:
        """(T, k) experts of each token, best first."""
        tokens, choices = torch.arange(self.num_tokens)[:, None], torch.arange(self.k)
        if self.load == "balanced":
            return (tokens * self.k + choices) % self.num_experts
        if self.k == 1:
            others = 1 + tokens % (self.num_experts - 1)
            return torch.where(tokens < self.num_tokens // 2, 0, others)
        others = 1 + (tokens * (self.k - 1) + choices - 1) % (self.num_experts - 1)
        return torch.where(choices == 0, 0, others)


@dataclass(frozen=True)
class Problem:
    """Tokens whose routing is known, and the weights that all candidates start from.

    Attributes:
        shape: What it is an example of.
        tokens: (T, D). Their first E values are the gate's logits.
        towards: (T, D) gradient of the output.
        gate_weight: (E, D): reads a token's first E values.
        weights: Of the experts.
    """

    shape: Shape
    tokens: Tensor
    towards: Tensor
    gate_weight: Tensor
    weights: Weights


def build_problem(shape: Shape, device: torch.device) -> Problem:
    """Draws tokens and weights, in float32.

    The chosen experts' logits lie above 2 and at least 0.4 apart, the others' between 0 and 1: rounding does not change
    the choice.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    tokens = normal(shape.num_tokens, shape.width)
    noise = torch.rand(shape.num_tokens, shape.num_experts, generator=generator)
    above = 2.0 + 0.5 * torch.arange(shape.k, 0, -1) + 0.1 * noise[:, : shape.k]
    tokens[:, : shape.num_experts] = noise.scatter(1, shape.expert_ids(), above)
    tokens = tokens[torch.randperm(shape.num_tokens, generator=generator)]
    torch.manual_seed(0)
    experts = MLPExperts(range(shape.num_experts), shape.width, shape.hidden)
    weights = [weight.detach().to(device) for weight in (experts.w1, experts.b1, experts.w2, experts.b2)]
    gate_weight = torch.eye(shape.num_experts, shape.width)
    return Problem(
        shape,
        tokens.to(device).requires_grad_(),
        normal(shape.num_tokens, shape.width).to(device),
        gate_weight.to(device),
        Weights(*weights),
    )


@dataclass(frozen=True)
class Candidate:
    """One way of computing it.

    Attributes:
        module: Holds its parameters.
        forward: Tokens (T, D) to outputs (T, D).
    """

    module: nn.Module
    forward: Callable[[Tensor], Tensor]


def our_layer(problem: Problem) -> Candidate:
    """``MoELayer`` with ``TopKGate`` and ``MLPExperts``."""
    shape = problem.shape
    gate = TopKGate(gate_network(problem), shape.num_experts, shape.k, renormalize=shape.k > 1)
    with torch.device("meta"):  # its own initial values are not wanted
        experts = MLPExperts(range(shape.num_experts), shape.width, shape.hidden)
    for name, weight in zip(("w1", "b1", "w2", "b2"), problem.weights, strict=True):
        setattr(experts, name, nn.Parameter(weight.clone()))
    layer = MoELayer(gate, experts)
    return Candidate(layer, lambda x: layer(x)[0])


def masked_loop(problem: Problem) -> Candidate:
    """What everybody writes first: for each expert, look up its tokens, compute, add."""
    layer = MaskedLoop(gate_network(problem), separate_experts(problem), problem.shape.k)
    return Candidate(layer, layer)


def dense_mlp(problem: Problem) -> Candidate:
    """One MLP of k times the hidden width: as much work as the experts do for a token."""
    shape = problem.shape
    mlp = nn.Sequential(
        nn.Linear(shape.width, shape.k * shape.hidden), nn.GELU(), nn.Linear(shape.k * shape.hidden, shape.width)
    ).to(problem.tokens.device)
    return Candidate(mlp, mlp)


class MaskedLoop(nn.Module):
    """The naive mixture of experts.

    Args:
        gate: Tokens to logits (T, E).
        experts: One module an expert.
        k: Experts a token.
    """

    def __init__(self, gate: nn.Module, experts: list[nn.Module], k: int) -> None:
        super().__init__()
        self.gate = gate
        self.experts = nn.ModuleList(experts)
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        probs = self.gate(x).float().softmax(dim=-1)
        weights, expert_ids = probs.topk(self.k, dim=-1)  # (T, k)
        if self.k > 1:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        output = torch.zeros(x.shape, dtype=weights.dtype, device=x.device)
        for number, expert in enumerate(self.experts):
            rows, choices = torch.where(expert_ids == number)
            output = output.index_add(0, rows, expert(x[rows]) * weights[rows, choices, None])
        return output.to(x.dtype)


def gate_network(problem: Problem) -> nn.Linear:
    """The gate of all mixtures."""
    return _linear(problem.gate_weight, None)


def separate_experts(problem: Problem) -> list[nn.Module]:
    """One module an expert with the problem's weights."""
    return [
        nn.Sequential(_linear(w1.T, b1), nn.GELU(), _linear(w2.T, b2))
        for w1, b1, w2, b2 in zip(*problem.weights, strict=True)
    ]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone())
    return linear
