"""``model``: a tagged union on ``name``, one class a model."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distmoe.config.base import AsTuple, NonNegativeFloat, NonNegativeInt, PathText, PositiveInt, Section, Widths

TensorNames = Annotated[tuple[Annotated[str, Field(min_length=1, max_length=200)], ...], AsTuple]


class ModelSection(Section):
    """What all models share."""

    init_from: PathText | None = None
    """Start from the weights of a run's folder or an exported .safetensors file, instead of fresh ones."""
    init_mode: Literal["exact", "upcycle", "grow"] = "exact"
    """How ``init_from`` is used: every tensor as it is; every expert a copy of a dense run's layer; or the first
    experts from a run with as many or fewer. What has no counterpart starts fresh: a gate, a further expert."""
    init_skip: TensorNames = ()
    """Parts that start fresh instead, by the beginning of their tensors' names: [head] where the classes are others."""
    upcycle_noise: NonNegativeFloat = 0.01
    """Noise that makes the experts of ``upcycle`` differ, as a share of their weights' standard deviation."""
    freeze_experts: NonNegativeInt = 0
    """The first experts of every layer, this many, keep the weights they start with: for a second task."""

    def training_problem(self) -> str | None:
        """Why a run cannot start like that, and what to do; None where it can."""
        if self.init_from is None and (self.init_mode != "exact" or self.init_skip):
            name = "model.init_mode" if self.init_mode != "exact" else "model.init_skip"
            return f"{name} needs model.init_from, the run or exported file to start from"
        if self.init_from is None and self.freeze_experts:
            return "model.freeze_experts needs model.init_from: experts with random weights are not worth keeping"
        return None


class TutorialModel(ModelSection):
    """CNN experts and a CNN gate on the image; the mixture of the experts' class probabilities."""

    name: Literal["tutorial"] = "tutorial"
    """Model."""
    channels: Widths = (32, 64)
    """Channels of an expert's convolutions; a 2x2 max-pool follows each."""
    hidden: PositiveInt = 128
    """Width of an expert's hidden layer."""
    gate_channels: Widths = (16, 32)
    """Channels of the gate's convolutions."""
    gate_hidden: PositiveInt = 32
    """Width of the gate's hidden layer."""


class TutorialCNN(ModelSection):
    """One expert of the tutorial model alone, of any width: its dense twins."""

    name: Literal["tutorial_cnn"] = "tutorial_cnn"
    """Model."""
    channels: Widths = (32, 64)
    """Channels of the convolutions; a 2x2 max-pool follows each."""
    hidden: PositiveInt = 128
    """Width of the hidden layer."""


class ConvNetModel(ModelSection):
    """A fast convolutional network with feed-forward layers over spatial tokens; sparse where ``moe`` is given."""

    name: Literal["convnet"] = "convnet"
    """Model."""
    widths: Widths = (32, 64, 128)
    """Channels of the three stages, each half the height and width of the one before."""
    ffn_stages: Annotated[tuple[PositiveInt, ...], AsTuple] = (2, 3)
    """Stages (from 1) that end with a feed-forward layer over their positions."""
    ffn_hidden: PositiveInt = 128
    """Hidden width of one expert, or of the dense feed-forward layer where there is no ``moe`` section."""

    @model_validator(mode="after")
    def _check(self) -> "ConvNetModel":
        if any(stage > len(self.widths) for stage in self.ffn_stages) or len(set(self.ffn_stages)) < len(
            self.ffn_stages
        ):
            raise ValueError(
                f"model.ffn_stages {list(self.ffn_stages)} must be different stages of 1..{len(self.widths)}"
            )
        return self


AnyModel = Annotated[TutorialModel | TutorialCNN | ConvNetModel, Field(discriminator="name")]
