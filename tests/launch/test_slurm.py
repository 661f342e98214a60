"""``sbatch launch/slurm.sbatch`` on a real Slurm of two nodes: warnings, requeue, a node that fails, equal losses."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from distmoe.train import train
from distmoe.training.run_folder import RunFolder
from tests.conftest import REPOSITORY
from tests.launch import slurm
from tests.launch.hosts import Hosts
from tests.launch.slurm import Slurm
from tests.runs import last_state, metrics_lines, steps_logged, tiny_config, write_quadrants, write_tiny_config

pytestmark = [pytest.mark.launch, pytest.mark.skipif(slurm.why_not() is not None, reason=str(slurm.why_not()))]

TIMEOUT_S = 90.0  # the processors are shared by both nodes
SBATCH = REPOSITORY / "launch" / "slurm.sbatch"
# A step of 16 micro-batches takes long enough to be interrupted several times on the way.
RUN = (
    *("train.accumulation=16", "train.epochs=4", "train.evaluate_every_epochs=4", "train.checkpoint_every_steps=100"),
    *("optim.lr=1e-4", "parallel.timeout_s=10", "parallel.expert_parallel_size=1"),
)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Slurm]:
    with Hosts(2, tmp_path) as nodes:
        yield Slurm(nodes)


def wait_for_step(run: RunFolder, step: int) -> None:
    slurm.wait_until(lambda: steps_logged(run) >= step, TIMEOUT_S, lambda: f"only {steps_logged(run)} steps are done")


@pytest.fixture
def submitted(cluster: Slurm, tmp_path: Path) -> tuple[int, RunFolder]:
    """A job on both nodes, some steps after its start, and its run."""
    data = write_quadrants(tmp_path / "quadrants.npz")
    config = write_tiny_config(data, tmp_path / "runs", *RUN, "run.name=job")
    output = f"--output={tmp_path / 'job.log'}"
    job = cluster.submit(SBATCH, "--nodes=2", output, arguments=["--cpu", str(config)], cwd=REPOSITORY)
    run = RunFolder(tmp_path / "runs" / "job")
    wait_for_step(run, 3)
    return job, run


def assert_undisturbed(run: RunFolder, tmp_path: Path) -> None:
    """The losses of one process, up to the order of summation."""
    undisturbed = tiny_config(tmp_path / "quadrants.npz", tmp_path / "runs", *RUN, "run.name=undisturbed")
    train(undisturbed)
    ours, theirs = metrics_lines(run), metrics_lines(RunFolder.of(undisturbed))
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-4)


def test_job_saves_goes_on_and_ends_as_undisturbed(cluster: Slurm, submitted: tuple[int, RunFolder], tmp_path: Path):
    job, run = submitted
    cluster.signal(job, "USR1", batch=True)  # as two minutes before the end of its time
    cluster.wait(job, {"PENDING"}, TIMEOUT_S)
    saved = last_state(run).progress.step
    assert saved == steps_logged(run) >= 3
    wait_for_step(run, saved + 2)
    assert cluster.show(job)["Restarts"] == "1"
    cluster.requeue(job)  # as a job of higher priority does: SIGTERM
    cluster.wait(job, {"PENDING"}, TIMEOUT_S)
    assert last_state(run).progress.step == steps_logged(run) >= saved + 2
    assert cluster.wait(job, timeout=TIMEOUT_S) == "COMPLETED"
    assert_undisturbed(run, tmp_path)


@pytest.mark.slow
def test_job_goes_on_when_its_node_is_back(cluster: Slurm, submitted: tuple[int, RunFolder], tmp_path: Path):
    job, run = submitted
    node = cluster.hosts[1]
    node.kill()
    cluster.wait(job, {"PENDING"}, TIMEOUT_S)
    node.boot()
    assert cluster.wait(job, timeout=TIMEOUT_S) == "COMPLETED"
    assert cluster.show(job)["Restarts"] == "1"
    assert_undisturbed(run, tmp_path)
