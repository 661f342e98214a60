"""Every gate in the forms that differ, alone and inside a layer: what the tests of the common contract go through."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from distmoe.config import AnyGate
from distmoe.contracts import Context
from distmoe.moe.experts import MLPExperts
from distmoe.moe.gates import build_gate
from distmoe.moe.gates.base import Gate
from distmoe.moe.layer import MoELayer
from distmoe.moe.routing import Routing

NUM_EXPERTS, WIDTH, HIDDEN = 5, 3, 4
SECTIONS: TypeAdapter[Any] = TypeAdapter(AnyGate)


@dataclass(frozen=True)
class Form:
    """A gate with settings.

    Attributes:
        name: Key of ``GATES``.
        settings: Beside the name, as in ``moe.gate``.
        trained: Whether these settings can be trained.
        alone: Whether what a sample gets does not depend on the other samples.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    trained: bool = True
    alone: bool = True

    def gate(self, num_experts: int = NUM_EXPERTS, width: int = WIDTH, hidden: int = HIDDEN) -> Gate:
        """With linear networks that have a bias, from torch's generator."""
        section = SECTIONS.validate_python({"name": self.name, **self.settings})
        return build_gate(section, num_experts, lambda num_outputs: nn.Linear(width, num_outputs), hidden)

    def layer(
        self, num_experts: int = NUM_EXPERTS, width: int = WIDTH, hidden: int = HIDDEN, seed: int = 0
    ) -> MoELayer:
        """The gate in front of MLP experts with biases."""
        torch.manual_seed(seed)
        gate = self.gate(num_experts, width, hidden)
        experts = MLPExperts(range(num_experts), width, hidden, with_hidden=gate.needs_hidden)
        nn.init.normal_(experts.b1)
        nn.init.normal_(experts.b2)
        return MoELayer(gate, experts)


FORMS = {
    "dense": Form("dense"),
    "dense-constrained": Form("dense", {"margin": 0.5}),
    "dense-k2": Form("dense", {"k": 2}, trained=False),
    "topk-1": Form("topk", {"k": 1, "renormalize": False}),
    "topk-2": Form("topk", {"k": 2}),
    "topk-all": Form("topk", {"k": NUM_EXPERTS, "renormalize": False}),
    "topk-capacity": Form("topk", {"k": 2, "capacity_factor": 1.0}),
    "topk-prioritised": Form("topk", {"k": 2, "capacity_factor": 0.5, "priority": "score"}),
    "topk-batch": Form("topk", {"k": 2, "capacity_factor": 0.7, "group": "batch"}, alone=False),
    "noisy_topk": Form("noisy_topk"),
    "noisy_topk-fixed": Form("noisy_topk", {"k": 3, "noise_std": 0.3, "capacity_factor": 1.0, "priority": "score"}),
    "switch": Form("switch", {"jitter": 0.1}),
    "switch-capacity": Form("switch", {"capacity_factor": 1.25, "group": 2}, alone=False),
    "cosine": Form("cosine", {"projection": 4}),
    "sigmoid": Form("sigmoid"),
    "sigmoid-scaled": Form("sigmoid", {"k": 3, "renormalize": False, "scale": 2.5}),
    "expert_choice": Form("expert_choice"),
    "expert_choice-groups": Form("expert_choice", {"capacity_factor": 1.0, "group": 3}, alone=False),
    "soft": Form("soft", {"slots_per_expert": 2}),
    "soft-groups": Form("soft", {"group": 3}, alone=False),
    "attentive": Form("attentive", {"width": 4}),
    "attentive-k2": Form("attentive", {"width": 4, "k": 2}, trained=False),
    "hash": Form("hash", {"k": 2}),
    "hash-sample": Form("hash", {"by": "sample", "capacity_factor": 1.0}),
    "uniform": Form("uniform"),
}


def forms_that(condition: Callable[[Form], bool]) -> list[Any]:
    """Parameters of a test over some of the forms."""
    return [pytest.param(form, id=name) for name, form in FORMS.items() if condition(form)]


ALL_FORMS = forms_that(lambda form: True)
TRAINED_FORMS = forms_that(lambda form: form.trained)
FORMS_ALONE = forms_that(lambda form: form.alone)
FORMS_WITH_NETWORK = forms_that(lambda form: form.name not in ("hash", "uniform"))


class Given(nn.Module):
    """A gate network whose outputs are the tokens themselves."""

    def forward(self, x_T: torch.Tensor) -> torch.Tensor:
        return x_T


def context(num_rows: int, rows_per_sample: int = 1, training: bool = True, **other: Any) -> Context:
    """Of samples 0, 1, ... that have this many rows in all."""
    samples = torch.arange(math.ceil(num_rows / rows_per_sample))
    given = Context(seed=0, step=0, sample_ids=samples, training=training, rows_per_sample=rows_per_sample)
    return replace(given, **other)


def tokens(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def triples(routing: Routing) -> list[tuple[int, int, float]]:
    """(row, expert, weight) of each assignment, in its order."""
    assert routing.weights_A is not None
    return list(zip(routing.row_ids_A.tolist(), routing.expert_ids_A.tolist(), routing.weights_A.tolist(), strict=True))


def pairs(routing: Routing) -> list[tuple[int, int]]:
    """(row, expert) of each assignment, in its order."""
    return list(zip(routing.row_ids_A.tolist(), routing.expert_ids_A.tolist(), strict=True))
