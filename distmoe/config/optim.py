"""``optim`` (a tagged union on ``name``) and ``schedule``."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distmoe.config.base import AsTuple, Momentum, NonNegativeFloat, PositiveFloat, Section, Share


class OptimSection(Section):
    """What all optimizers share."""

    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of matrices and filters; biases, norms and other vectors are left alone."""


class SGDSection(OptimSection):
    """Stochastic gradient descent; weight decay is added to the gradient."""

    name: Literal["sgd"] = "sgd"
    """Optimizer."""
    momentum: Momentum = 0.9
    """Momentum."""
    nesterov: bool = False
    """Nesterov's form of momentum."""

    @model_validator(mode="after")
    def _check(self) -> "SGDSection":
        if self.nesterov and self.momentum == 0:
            raise ValueError("optim.nesterov needs optim.momentum above 0")
        return self


class AdamWSection(OptimSection):
    """AdamW: decoupled weight decay; with weight decay 0 it is Adam."""

    name: Literal["adamw"] = "adamw"
    """Optimizer."""
    betas: Annotated[tuple[Momentum, Momentum], AsTuple] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""


AnyOptimizer = Annotated[SGDSection | AdamWSection, Field(discriminator="name")]


class ScheduleSection(Section):
    """Learning rate over the run: linear warm-up, then constant, cosine or linear decay."""

    name: Literal["constant", "cosine", "linear"] = "constant"
    """Shape after the warm-up."""
    warmup_share: Share = 0.0
    """Share of all steps that the warm-up takes."""
    final_share: Share = 0.0
    """Learning rate at the last step, as a share of the peak; not used by ``constant``."""
