"""What a model is: images and a context in, class scores and the routings of its layers out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from distmoe.contracts import Context, DataSpec
from distmoe.moe.gates.base import Gate
from distmoe.moe.objectives import classification_losses, negative_log_likelihood
from distmoe.moe.routing import Routing, at_least_float32


@dataclass(frozen=True)
class ModelOutput:
    """One forward pass. Exactly one of ``logits`` and ``log_probs`` is given.

    Attributes:
        logits: (B, C) unnormalised class scores.
        log_probs: (B, C) log class probabilities, of models that mix probabilities.
        routings: The routing of each layer, by the layer's name.
        objective: What training minimises instead of the cross-entropy: from labels (B,) and label smoothing to (B,).
            Given by a forward pass in training only.
        favourite_predictions: (B,) int64, the class that the most probable expert of each sample predicts by itself;
            given in evaluation, by models whose experts are classifiers.
    """

    logits: Tensor | None = None
    log_probs: Tensor | None = None
    routings: Mapping[str, Routing] = field(default_factory=dict)
    objective: Callable[[Tensor, float], Tensor] | None = None
    favourite_predictions: Tensor | None = None

    @property
    def scores(self) -> Tensor:
        """(B, C): whichever was given; the largest is the prediction."""
        scores = self.logits if self.logits is not None else self.log_probs
        assert scores is not None, "a model gives logits or log_probs"
        return scores

    def losses(self, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """(B,) what is minimised, of each sample, float32: the objective if there is one, else the cross-entropy."""
        if self.objective is not None:
            return self.objective(labels, label_smoothing)
        return self.cross_entropies(labels, label_smoothing)

    def cross_entropies(self, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """(B,) float32 cross-entropy of each sample, whatever is minimised."""
        if self.logits is not None:
            return classification_losses(self.logits, labels, label_smoothing)
        return negative_log_likelihood(at_least_float32(self.scores), labels, label_smoothing)


class Model(Protocol):
    """Called with raw images, as the loader delivers them: normalisation is the model's first step."""

    def __call__(self, images: Tensor, context: Context) -> ModelOutput:
        """(B, C, H, W) uint8 or (B, ...) float32, B may be 0, to the output."""
        ...


class Network(nn.Module):
    """The base of all models."""

    def gates(self) -> dict[str, Gate]:
        """The gate behind each of the output's routings, by the same name; none in a dense model."""
        return {}


class Normalize(nn.Module):
    """``(x - mean) / std`` in float32, per channel of images; the constants are saved with the weights.

    Args:
        spec: Shape of a sample (the first axis is the channel if it has as many entries as ``mean``).
        mode: ``standard`` (the training set's statistics), ``unit`` (x / 255) or ``none``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: DataSpec, mode: str = "standard") -> None:
        super().__init__()
        mean, std = spec.mean, spec.std
        if mode != "standard":
            mean, std = (0.0,) * len(mean), (255.0 if mode == "unit" else 1.0,) * len(std)
        shape = (len(mean),) + (1,) * (len(spec.input_shape) - 1)
        self.register_buffer("mean", torch.tensor(mean).view(shape))
        self.register_buffer("std", torch.tensor(std).view(shape))

    def forward(self, images: Tensor) -> Tensor:
        """(B, ...) of any number type to float32 of the same shape."""
        return (images.to(self.mean.dtype) - self.mean) / self.std
