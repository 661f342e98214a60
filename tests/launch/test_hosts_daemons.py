"""The ssh servers and the Slurm cluster of imitated hosts: log-ins, jobs, requeueing, and hosts that fail."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import slurm, ssh
from tests.launch.hosts import Hosts
from tests.launch.slurm import Slurm, wait_until
from tests.launch.ssh import PDSH, serve_ssh

pytestmark = pytest.mark.launch


def files_under(*folders: str) -> set[tuple[str, float]]:
    """Every file and folder under these, with the time of its last change."""
    paths = [path for folder in folders for path in (Path(folder), *Path(folder).rglob("*")) if path.exists()]
    return {(str(path), path.stat().st_ctime) for path in paths}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if reason := ssh.why_not() or slurm.why_not():
        pytest.skip(reason)
    machine = ("/etc/ssh", os.path.expanduser("~root/.ssh"), "/run/sshd", "/etc/slurm", "/etc/munge", "/run/munge")
    before = files_under(*machine)
    with Hosts(2, tmp_path_factory.mktemp("hosts")) as two:
        yield two
    assert files_under(*machine) == before


@pytest.fixture(scope="module")
def cluster(hosts: Hosts) -> Slurm:
    return Slurm(hosts)


def test_log_in_to_every_host_and_after_a_boot(hosts: Hosts):
    serve_ssh(hosts)
    assert hosts[0].run(["ssh", "host2", "hostname"]).stdout == "host2\n"
    assert {listener[:2] for listener in hosts[1].listening() if listener.program == "sshd"} == {("10.77.0.2", 22)}
    pdsh = ["pdsh", "-w", "host1,host2", "hostname; exit $(($(hostname | tail -c 2) - 1))"]
    answers = hosts[1].run(pdsh, env=PDSH, check=False)
    assert sorted(answers.stdout.splitlines()) == ["host1: host1", "host2: host2"]
    assert "host2: ssh exited with exit code 1" in answers.stderr
    hosts[1].kill()
    assert "Connection refused" in hosts[0].run(["ssh", "host2", "true"], check=False).stderr
    hosts[1].boot()
    assert hosts[0].run(["ssh", "root@10.77.0.2", "hostname"]).stdout == "host2\n"
    assert "not known" in hosts[0].run(["ssh", "host3", "true"], check=False).stderr


def write_job(folder: Path, *lines: str) -> Path:
    script = folder / "job"
    script.write_text("\n".join(["#!/bin/bash", *lines]))
    return script


def wait_for_line(path: Path, line: str) -> None:
    wait_until(lambda: path.exists() and line in path.read_text().splitlines(), 10, lambda: f"no {line!r} in {path}")


def test_tasks_run_on_both_hosts(cluster: Slurm, tmp_path: Path):
    assert cluster.nodes() == {"host1": "idle", "host2": "idle"}
    assert sorted(cluster.run(["srun", "--nodes=2", "hostname"]).split()) == ["host1", "host2"]
    script = write_job(tmp_path, "srun sh -c 'echo $GREETING $1 $SLURM_PROCID' task \"$1\"; exit 3")
    options = ("--nodes=2", f"--output={tmp_path}/out")
    job = cluster.submit(script, *options, arguments=["to"], env={"GREETING": "hello"})
    assert cluster.wait(job) == "FAILED"
    assert cluster.show(job)["ExitCode"] == "3:0"
    assert sorted((tmp_path / "out").read_text().splitlines()) == ["hello to 0", "hello to 1"]


def test_requeued_job_runs_again_within_seconds(cluster: Slurm, tmp_path: Path):
    script = write_job(
        tmp_path,
        "trap 'echo got USR1' USR1",
        "srun sh -c 'echo run ${SLURM_RESTART_COUNT:-0} of task $SLURM_PROCID'",
        '[ -n "$SLURM_RESTART_COUNT" ] || while :; do sleep 60 & wait; done',
    )
    job = cluster.submit(script, "--nodes=2", "--requeue", "--open-mode=append", f"--output={tmp_path}/out")
    cluster.wait(job, {"RUNNING"}, timeout=10)
    wait_for_line(tmp_path / "out", "run 0 of task 1")
    cluster.signal(job, "USR1", batch=True)
    wait_for_line(tmp_path / "out", "got USR1")
    cluster.requeue(job)
    assert cluster.wait(job, timeout=15) == "COMPLETED"
    assert cluster.show(job)["Restarts"] == "1"
    lines = (tmp_path / "out").read_text().splitlines()
    ours = [line for line in lines if line.startswith(("run", "got"))]
    assert sorted(ours[:2]) == ["run 0 of task 0", "run 0 of task 1"]
    assert ours[2] == "got USR1"
    assert sorted(ours[3:]) == ["run 1 of task 0", "run 1 of task 1"]


def test_cancelled_job_ends(cluster: Slurm, tmp_path: Path):
    job = cluster.submit(write_job(tmp_path, "sleep 60"), f"--output={tmp_path}/out")
    cluster.wait(job, {"RUNNING"}, timeout=10)
    cluster.cancel(job)
    assert cluster.wait(job, timeout=10) == "CANCELLED"


@pytest.mark.slow
def test_dead_host_is_noticed_and_its_job_requeued(hosts: Hosts, cluster: Slurm, tmp_path: Path):
    script = write_job(tmp_path, "srun sleep ${SLURM_RESTART_COUNT:-60}")
    job = cluster.submit(script, "--nodes=2", "--requeue", f"--output={tmp_path}/out")
    cluster.wait(job, {"RUNNING"}, timeout=10)
    hosts[1].kill()
    cluster.wait_for_nodes("down", ["host2"])
    assert cluster.wait(job, {"PENDING"}, timeout=10) == "PENDING"
    hosts[1].boot()
    assert cluster.wait(job, timeout=30) == "COMPLETED"
    assert cluster.show(job)["Restarts"] == "1"


@pytest.mark.slow
def test_dead_slurmd_is_noticed_and_returns(hosts: Hosts, cluster: Slurm):
    cluster.kill_slurmd(hosts[1])
    cluster.wait_for_nodes("down", ["host2"], timeout=60)
    cluster.restart_slurmd(hosts[1])
    cluster.wait_for_nodes("idle", ["host2"])
