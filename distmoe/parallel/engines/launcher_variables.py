"""What libraries read from a launcher's environment variables: what this run knows, and nothing else."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from distmoe.parallel.mesh import Mesh

_LAUNCHER_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


@contextmanager
def world_variables(mesh: Mesh, device: torch.device) -> Iterator[None]:
    """Inside, a library finds the rank, the world and the local rank of this process.

    Nothing of the kind need be set: the world may come from elsewhere than from a launcher.

    Args:
        mesh: Who is where.
        device: Its index is the local rank.
    """
    with without_launcher_variables():
        ours = {"LOCAL_RANK": str(device.index or 0)}
        if mesh.world_size > 1:
            # The process group is there already: nobody connects to the address.
            ours |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
            ours |= {"RANK": str(mesh.rank), "WORLD_SIZE": str(mesh.world_size)}
        os.environ |= ours
        try:
            yield
        finally:
            for name in ours:
                os.environ.pop(name, None)


@contextmanager
def without_launcher_variables() -> Iterator[None]:
    """Inside, a library that reads launchers' variables finds none: a run's settings come from its configuration.

    Accelerate would divide gradients by ``ACCELERATE_GRADIENT_ACCUMULATION_STEPS``, and open a process group for the
    one process of ``torchrun --nproc-per-node 1``.
    """
    hidden = {name for name in os.environ if name.startswith("ACCELERATE_") or name in _LAUNCHER_VARIABLES}
    kept = {name: os.environ.pop(name) for name in hidden}
    try:
        yield
    finally:
        for name in _LAUNCHER_VARIABLES:  # Accelerate sets some, which would be taken for the launcher's
            os.environ.pop(name, None)
        os.environ.update(kept)
