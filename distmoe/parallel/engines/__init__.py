"""The engines, one file each, one line each in ``ENGINES``."""

import importlib

import torch

from distmoe.config import RunConfig
from distmoe.parallel.engines.protocol import Engine

# Module and class of each engine; a module is imported when its engine is chosen, so that nobody pays for the others.
ENGINES: dict[str, tuple[str, str]] = {
    "replicas": ("distmoe.parallel.engines.replicas", "ReplicasEngine"),
}


def build_engine(config: RunConfig, device: torch.device) -> Engine:
    """The engine of ``parallel.backend``; ``auto`` takes replicas, as no expert is sharded in one process."""
    name = "replicas" if config.parallel.backend == "auto" else config.parallel.backend
    module, cls = ENGINES[name]
    engine: Engine = getattr(importlib.import_module(module), cls)(config, device)
    return engine
