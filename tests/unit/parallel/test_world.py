"""What launchers' variables say."""

import pytest
import torch

from distmoe.contracts import UserError
from distmoe.parallel.runtime import choose_device
from distmoe.parallel.world import World

STORE = {"MASTER_ADDR": "host0", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **STORE}
SLURM = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "1", "SLURM_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_ID": "0", **STORE,
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, World(0, 1, 0, 1)),
        (TORCHRUN, World(5, 8, 1, 4)),
        ({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"}, World(5, 8, 1, 4, restarts=2)),
        # deepspeed has another name for the processes of a host.
        ({**{k: v for k, v in TORCHRUN.items() if k != "LOCAL_WORLD_SIZE"}, "LOCAL_SIZE": "2"}, World(5, 8, 1, 2)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, World(0, 1, 0, 1)),
        (SLURM, World(5, 6, 1, 2)),
        ({**SLURM, **TORCHRUN}, World(5, 8, 1, 4)),
        # The script of a batch job is one process, before it calls srun.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "6", "SLURM_LOCALID": "0"}, World(0, 1, 0, 1)),
    ],
    ids=["none", "torchrun", "restarted", "deepspeed", "one process", "srun", "torchrun under srun", "batch script"],
)
def test_world_of_a_launcher(environment: dict[str, str], world: World):
    assert World.of_environment(environment) == world


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": "two"}, r"WORLD_SIZE \('two'\) must be a whole number"),
        ({"RANK": "-1"}, r"RANK \('-1'\) must be a whole number"),
        ({"LOCAL_RANK": ""}, r"LOCAL_RANK \(''\) must be a whole number"),
        ({"MASTER_PORT": "http"}, r"MASTER_PORT \('http'\) must be a whole number"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is missing, though others say that there are several processes"),
        ({"RANK": None}, "RANK is missing"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK is missing"),
        ({"RANK": "8"}, r"RANK \(8\), WORLD_SIZE \(8\), .* do not fit together"),
        ({"LOCAL_RANK": "4"}, r"LOCAL_RANK \(4\) and LOCAL_WORLD_SIZE \(4\) do not fit together"),
        ({"LOCAL_WORLD_SIZE": "16"}, r"LOCAL_WORLD_SIZE \(16\) do not fit together"),
        ({"LOCAL_WORLD_SIZE": "3"}, "every host must have as many processes"),
        ({"TORCHELASTIC_RESTART_COUNT": "x"}, r"TORCHELASTIC_RESTART_COUNT \('x'\) must be a whole number"),
    ],
)
def test_bad_variables_are_named(changes: dict[str, str | None], message: str):
    environment = {name: value for name, value in {**TORCHRUN, **changes}.items() if value is not None}
    with pytest.raises(UserError, match=message):
        World.of_environment(environment)


def test_nobody_serves_the_store(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")  # a port that takes a privilege nobody has asked for
    with pytest.raises(UserError, match=r"rank 3: nobody answers at MASTER_ADDR \(127\.0\.0\.1\), MASTER_PORT \(1\)"):
        World(rank=3, size=4).open_store(limit_s=0.2)


@pytest.mark.parametrize(
    ("visible", "num_gpus", "device"),
    [
        (None, 2, "cuda:1"),
        ("4,5", 2, "cuda:1"),
        ("5", 1, "cuda:0"),  # each process sees its own
        ("", 0, "cpu"),
        (None, 1, "2 processes on this host, but 1 GPUs"),
        ("4,5,6", 3, "cuda:1"),
    ],
)
def test_device_of_a_rank(visible: str | None, num_gpus: int, device: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    try:
        found = str(choose_device(World(rank=3, size=4, local_rank=1, ranks_per_host=2)))
    except UserError as error:
        found = str(error).partition(":")[0]
    assert found == device
