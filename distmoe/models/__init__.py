"""The models: one file each, one line each in ``MODELS``; and what is done to any of them."""

from collections.abc import Callable
from typing import Any

from torch import random

from distmoe.config import RunConfig
from distmoe.contracts import DataSpec, UserError
from distmoe.models.convnet import ConvNet
from distmoe.models.initial import initialize_parameters
from distmoe.models.protocol import Network
from distmoe.models.tutorial import TutorialMixture, TutorialTwin
from distmoe.moe.dispatch import Placement

MODELS: dict[str, Callable[[Any, RunConfig, DataSpec, Placement], Network]] = {
    "tutorial": lambda section, config, spec, placement: TutorialMixture(
        section, _moe(config), spec, config.data.normalize, placement
    ),
    "tutorial_cnn": lambda section, config, spec, placement: TutorialTwin(section, spec, config.data.normalize),
    "convnet": lambda section, config, spec, placement: ConvNet(
        section, config.moe, spec, config.data.normalize, placement
    ),
}


def build_model(config: RunConfig, spec: DataSpec, placement: Placement | None = None) -> Network:
    """The model of a configuration with its initial weights, holding only this rank's experts.

    The initial weights depend on the seed and the parameters' names alone: not on the placement, the order of
    construction or torch's generator, which is left as it was.

    Args:
        config: The run.
        spec: The data set.
        placement: Where the experts live; by default all of them here.

    Raises:
        UserError: The model does not fit the data.
    """
    if len(spec.input_shape) != 3:
        raise UserError(
            f"model.name {config.model.name} needs images (channels, height, width), "
            f"but data set {spec.name} has samples of shape {list(spec.input_shape)}"
        )
    try:
        with random.fork_rng(devices=[]):  # torch's modules draw when they are made
            model = MODELS[config.model.name](config.model, config, spec, placement or Placement())
    except ValueError as error:
        raise UserError(f"model.name {config.model.name} on data set {spec.name}: {error}") from None
    initialize_parameters(model, config.seed)
    return model


def _moe(config: RunConfig) -> Any:
    assert config.moe is not None, "checked by RunConfig"
    return config.moe
