"""What libraries read from a launcher's environment variables: inside, it is what this run knows, and nothing else."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from distmoe.parallel.mesh import Mesh
from distmoe.parallel.runtime import without_launcher_variables


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
