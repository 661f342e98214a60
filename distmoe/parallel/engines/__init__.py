"""The engines, one file each, one line each in ``ENGINES``."""

import importlib
import os

import torch

from distmoe.config import RunConfig
from distmoe.contracts import UserError
from distmoe.parallel.collectives import Observe, unobserved
from distmoe.parallel.engines.protocol import Engine
from distmoe.parallel.mesh import Mesh

# A module is imported when its engine is chosen, so that nobody pays for the others; its ENGINE is the class.
ENGINES: dict[str, str] = {
    "replicas": "distmoe.parallel.engines.replicas",
    "deepspeed": "distmoe.parallel.engines.deepspeed",
}


def choose_engine(config: RunConfig, mesh: Mesh) -> str:
    """The engine of ``parallel.backend``; ``auto`` takes DeepSpeed as soon as there is something to spread.

    Raises:
        UserError: The backend cannot do what the ``parallel`` section asks for.
    """
    section, size = config.parallel, mesh.expert_parallel_size
    spread = size > 1 or section.zero_stage > 0
    if section.backend == "replicas" and spread:
        asked = f"parallel.expert_parallel_size is {size}" if size > 1 else f"zero_stage is {section.zero_stage}"
        raise UserError(
            f"parallel.backend replicas holds everything in each process, but {asked}: use parallel.backend=deepspeed "
            "or auto, or parallel.expert_parallel_size=1 and parallel.zero_stage=0"
        )
    if section.backend == "auto":
        return "deepspeed" if spread else "replicas"
    return section.backend


def build_engine(config: RunConfig, mesh: Mesh, device: torch.device, observe: Observe = unobserved) -> Engine:
    """The engine of :func:`choose_engine`, with its groups of processes. Collective where there are several.

    Raises:
        UserError: It is not installed, or see there.
    """
    name = choose_engine(config, mesh)
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed looks for GPUs when it is imported
    try:
        module = importlib.import_module(ENGINES[name])
    except ImportError as error:
        raise UserError(
            f"parallel.backend {name} cannot be imported ({error}): install it (pip install 'distmoe[deepspeed]'), or "
            "use parallel.backend=replicas with parallel.expert_parallel_size=1 and parallel.zero_stage=0"
        ) from None
    engine: Engine = module.ENGINE(config, mesh, device, observe)
    return engine
