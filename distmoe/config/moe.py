"""``moe``: the mixture; the gate is a tagged union on ``name``, one class a gate."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distmoe.config.base import NonNegativeFloat, PositiveFloat, PositiveInt, Section


class DenseGateSection(Section):
    """Softmax over all experts: every expert sees every token."""

    name: Literal["dense"] = "dense"
    """Gate."""


class TopKGateSection(Section):
    """Every token goes to its k most probable experts."""

    name: Literal["topk"] = "topk"
    """Gate."""
    k: PositiveInt = 2
    """Experts a token."""
    renormalize: bool = True
    """Divide the chosen probabilities by their sum. Not to train k=1 with: the gate would get no task gradient."""
    capacity_factor: PositiveFloat | None = None
    """Rows an expert takes from a routing group, as a multiple of the even share; null: dropless."""
    group: Literal["image", "batch"] | PositiveInt = "image"
    """Routing group inside which capacity acts: one image, that many images, or the micro-batch."""


AnyGate = Annotated[DenseGateSection | TopKGateSection, Field(discriminator="name")]


class LossWeights(Section):
    """Weights of the auxiliary losses, applied in one place, the training step. 0 is off."""

    load_balance: NonNegativeFloat = 0.0
    """Switch/GShard load balance: share of assignments times mean probability."""
    importance: NonNegativeFloat = 0.0
    """Squared coefficient of variation of the summed probabilities."""
    z: NonNegativeFloat = 0.0
    """Mean squared log-sum-exp of the gate's logits."""


class MoESection(Section):
    """The mixture: how many experts, which gate, which auxiliary losses."""

    num_experts: PositiveInt = 8
    """Experts of each layer."""
    gate: AnyGate = TopKGateSection()
    """Gate of each layer."""
    loss_weights: LossWeights = LossWeights()
    """Weights of the auxiliary losses."""

    @model_validator(mode="after")
    def _check(self) -> "MoESection":
        if isinstance(self.gate, TopKGateSection) and self.gate.k > self.num_experts:
            raise ValueError(f"moe.gate.k ({self.gate.k}) must be at most moe.num_experts ({self.num_experts})")
        return self
