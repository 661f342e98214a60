"""The engines, one file each, one line each in ``ENGINES``."""

import importlib

import torch

from distmoe.config import RunConfig
from distmoe.parallel.engines.protocol import Engine

# A module is imported when its engine is chosen, so that nobody pays for the others; its ENGINE is the class.
ENGINES: dict[str, str] = {
    "replicas": "distmoe.parallel.engines.replicas",
}


def build_engine(config: RunConfig, device: torch.device) -> Engine:
    """The engine of ``parallel.backend``; ``auto`` takes replicas, as no expert is sharded in one process."""
    name = "replicas" if config.parallel.backend == "auto" else config.parallel.backend
    engine: Engine = importlib.import_module(ENGINES[name]).ENGINE(config, device)
    return engine
