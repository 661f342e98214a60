"""What libraries see of a launcher's variables, and what is left of them afterwards."""

import os

import pytest
import torch

from distmoe.parallel.engines.launcher_variables import world_variables
from distmoe.parallel.mesh import Mesh

DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_ADDR": "host0"}


def test_library_sees_this_process_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch):
    for name in (*DEEPSPEED, "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**DEEPSPEED, "ACCELERATE_MIXED_PRECISION": "bf16"}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with world_variables(Mesh(world_size=2, rank=1), torch.device("cpu")):
        seen = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")}
        os.environ["LOCAL_WORLD_SIZE"] = "1"  # as Accelerate does, where the launcher has another name for it
    assert seen == {"RANK": "1", "WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": None}
    assert dict(os.environ) == before
