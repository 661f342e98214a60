"""What launchers' variables say, and what is refused because every process would train alone."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence

import psutil
import pytest

from distmoe.contracts import UserError
from distmoe.parallel.launchers import Place, first_host, read_place

STORE = {"MASTER_ADDR": "host0", "MASTER_PORT": "29500"}
MASTER = ("host0", 29500)
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **STORE}
SRUN = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "1", "SLURM_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "42", "SLURM_STEP_NODELIST": "node[7-9]",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "6", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", **STORE,
}  # fmt: skip
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "6", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", **STORE}
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "6", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "42"}


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


JOB = "slurm job  42"
SRUN_PLACE = Place(5, 6, 1, 2, 0, ("node7", 20294), job=JOB)

PLACES = {
    "none": ({}, Place()),
    "torchrun": (TORCHRUN, Place(5, 8, 1, 4, 0, MASTER)),
    "restarted": ({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"}, Place(5, 8, 1, 4, 2, MASTER)),
    "agent's store": ({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"}, Place(5, 8, 1, 4, 0, MASTER, True)),
    # deepspeed has another name for the processes of a host.
    "deepspeed": ({**without(TORCHRUN, "LOCAL_WORLD_SIZE"), "LOCAL_SIZE": "2"}, Place(5, 8, 1, 2, 0, MASTER)),
    "torchrun with one process": ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Place()),
    # A port of the job's own: 20000 + 42 * 7.
    "srun": (SRUN, SRUN_PLACE),
    "second step of a job": ({**SRUN, "SLURM_STEP_ID": "1"}, Place(5, 6, 1, 2, 0, ("node7", 20295), job=JOB)),
    "srun told where": ({**SRUN, **STORE}, Place(5, 6, 1, 2, 0, MASTER, job=JOB)),
    "srun told a port": ({**SRUN, "MASTER_PORT": "1234"}, Place(5, 6, 1, 2, 0, ("node7", 1234), job=JOB)),
    "job queued again": ({**SRUN, "SLURM_RESTART_COUNT": "3"}, Place(5, 6, 1, 2, 3, ("node7", 20294), job=JOB)),
    "torchrun under srun": ({**SRUN, **TORCHRUN}, Place(5, 8, 1, 4, 0, MASTER, job=JOB)),
    "mpirun under srun": ({**SRUN, **OPEN_MPI}, Place(5, 6, 1, 2, 0, MASTER, job=JOB)),
    "srun with variables of MPI": ({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "6"}, SRUN_PLACE),
    "batch script": ({**BATCH_SCRIPT, **STORE}, Place(job=JOB)),
    "interactive shell of a job": ({**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"}, Place(job=JOB)),
    "Open MPI": (OPEN_MPI, Place(5, 6, 1, 2, 0, MASTER)),
    "MPICH": (MPICH, Place(5, 6, 1, 2, 0, MASTER)),
    "as many as promised": ({**TORCHRUN, "DISTMOE_WORLD_SIZE": "8"}, Place(5, 8, 1, 4, 0, MASTER)),
}


@pytest.mark.parametrize("case", PLACES)
def test_place_of_a_launcher(case: str):
    environment, place = PLACES[case]
    assert read_place(environment) == place


REFUSED = {
    "not a number": ({**TORCHRUN, "WORLD_SIZE": "two"}, r"WORLD_SIZE \('two'\) must be a whole number"),
    "negative": ({**TORCHRUN, "RANK": "-1"}, r"RANK \('-1'\) must be a whole number"),
    "empty": ({**TORCHRUN, "LOCAL_RANK": ""}, r"LOCAL_RANK \(''\) must be a whole number"),
    "no processes and no rank": ({"WORLD_SIZE": "0"}, r"WORLD_SIZE \(0\) must be 1 or more"),
    "no processes": ({**TORCHRUN, "WORLD_SIZE": "0"}, r"WORLD_SIZE \(0\) must be 1 or more"),
    "name of a port": ({**TORCHRUN, "MASTER_PORT": "http"}, r"MASTER_PORT \('http'\) must be a whole number"),
    "port 0": ({**TORCHRUN, "MASTER_PORT": "0"}, r"MASTER_PORT \(0\) must be from 1 to 65535"),
    "port too large": ({**TORCHRUN, "MASTER_PORT": "65536"}, r"MASTER_PORT \(65536\) must be from 1 to 65535"),
    "no address": (without(TORCHRUN, "MASTER_ADDR"), "MASTER_ADDR is missing, though others say that there"),
    "empty address": ({**TORCHRUN, "MASTER_ADDR": ""}, "MASTER_ADDR is missing"),
    "no rank": (without(TORCHRUN, "RANK"), "RANK is missing"),
    "no local rank": (without(TORCHRUN, "LOCAL_RANK"), "LOCAL_RANK is missing"),
    "only a local rank": ({"LOCAL_RANK": "1"}, "RANK is missing"),
    "only a local size": ({"LOCAL_WORLD_SIZE": "2"}, "RANK is missing"),
    "rank outside": ({**TORCHRUN, "RANK": "8"}, r"RANK \(8\), WORLD_SIZE \(8\), .* do not fit together"),
    "local rank outside": ({**TORCHRUN, "LOCAL_RANK": "4"}, r"LOCAL_RANK \(4\) and LOCAL_WORLD_SIZE \(4\) do not fit"),
    "host larger than all": ({**TORCHRUN, "LOCAL_WORLD_SIZE": "16"}, r"LOCAL_WORLD_SIZE \(16\) do not fit together"),
    "hosts of different size": ({**TORCHRUN, "LOCAL_WORLD_SIZE": "3"}, "every host must have as many processes"),
    "restarts": ({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "x"}, r"TORCHELASTIC_RESTART_COUNT \('x'\) must be a"),
    "nodes of different size": (
        {**SRUN, "SLURM_TASKS_PER_NODE": "2(x2),1"},
        r"SLURM_TASKS_PER_NODE \(2\(x2\),1\) gives hosts different numbers of processes",
    ),
    # Each of two processes would be the only one, and write into the same folder.
    "mpirun without an address": (without(OPEN_MPI, "MASTER_ADDR"), "MASTER_ADDR is missing"),
    "mpirun of another kind": ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "MPI_LOCALRANKID is missing"),
    "fewer than promised": (
        {"DISTMOE_WORLD_SIZE": "2"},
        r"2 processes were to be started \(environment variable DISTMOE_WORLD_SIZE\), but this one is in a world of 1",
    ),
    "more than promised": ({**TORCHRUN, "DISTMOE_WORLD_SIZE": "4"}, r"4 processes .* in a world of 8"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_variables_are_named(case: str):
    environment, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        read_place(environment)


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        (["accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "distmoe"], 2),
        (["accelerate", "launch", "--cpu", "--num-processes=3", "-m", "distmoe"], 3),
        (["accelerate", "launch", "--cpu", "--num_processes", "1", "-m", "distmoe"], None),
        (["accelerate", "launch", "--cpu", "-m", "distmoe"], None),
    ],
)
def test_accelerate_that_starts_fewer_than_asked(
    command: Sequence[str], asked: int | None, monkeypatch: pytest.MonkeyPatch
):
    class Parent:
        def cmdline(self) -> Sequence[str]:
            return ["python", *command]

    monkeypatch.setattr(psutil.Process, "parent", lambda self: Parent())
    environment = {"ACCELERATE_MIXED_PRECISION": "no"}
    if asked is None:
        assert read_place(environment) == Place()
    else:
        with pytest.raises(UserError, match=f"accelerate launch was asked for {asked} processes and has started one"):
            read_place(environment)


def test_launch_names_the_process_that_starts_again():
    # Two processes of one parent are of one launch, and not of this test's own.
    code = "import os; from distmoe.parallel.launchers import read_place; print(read_place(os.environ).launch)"
    environment = {**TORCHRUN, "TORCHELASTIC_RUN_ID": "run"}
    named = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    ours = psutil.Process()
    ticks = (ours.create_time() - psutil.boot_time()) * os.sysconf("SC_CLK_TCK")
    started = round(ticks)
    assert named.stdout.strip() == f"{socket.gethostname()} {ours.pid} {started}"
    assert read_place(environment).launch not in (None, named.stdout.strip())


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[003-010,12],login", "node003"),
        ("gpu[7]", "gpu7"),
        ("rack[2,5-6]-gpu,x", "rack2-gpu"),
        ("a-b.example[1-2]", "a-b.example1"),
        ("rack[1-2]n[3-4]", "rack1n3"),
    ],
)
def test_first_of_slurms_hosts(hosts: str, first: str):
    assert first_host(hosts) == first
