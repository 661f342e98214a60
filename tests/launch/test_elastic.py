"""torchrun with a number of hosts that changes: a run goes on with those that are there, and its experts move."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from distmoe.train import train
from distmoe.training.run_folder import RunFolder
from tests.conftest import REPOSITORY
from tests.launch import hosts
from tests.launch.hosts import Host, Hosts
from tests.launch.processes import Process
from tests.runs import last_state, metrics_lines, steps_logged, tiny_config, write_quadrants, write_tiny_config

pytestmark = [pytest.mark.launch, pytest.mark.skipif(hosts.why_not() is not None, reason=str(hosts.why_not()))]

TIMEOUT_S = 60.0  # the processors are shared by all hosts, and every start imports torch three times
# It is stopped when all has been seen, long before its end. At a low learning rate the order of summation, which the
# layout decides, never comes to decide a token's expert.
RUN = (
    *("train.accumulation=16", "train.max_steps=10000", "train.evaluate_every_epochs=1000", "optim.lr=1e-5"),
    *("train.checkpoint_every_steps=2", "schedule.name=constant", "schedule.warmup_share=0", "parallel.timeout_s=10"),
)
GIVEN_UP = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=2"


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(2, tmp_path) as pair:
        yield pair


def launch(host: Host, config: Path, *overrides: str) -> Process:
    """The same command on every host."""
    options = ("--cpu", "--hosts", "1:2", "--master", "host1", "--restarts", "3", "--rendezvous", GIVEN_UP)
    command = ["bash", REPOSITORY / "launch" / "torchrun.sh", *options, config, *overrides]
    return host.popen(command, log=host._hosts.folder / f"{host.name}.log")


def test_run_goes_on_with_the_hosts_that_are_there(two_hosts: Hosts, tmp_path: Path):
    host1, host2 = two_hosts
    data = write_quadrants(tmp_path / "quadrants.npz")
    config = write_tiny_config(data, tmp_path / "runs", *RUN, "run.name=elastic")
    run = RunFolder(tmp_path / "runs" / "elastic")

    first = launch(host1, config)
    launch(host2, config)
    first.wait_for("2 processes, .*expert-parallel size 1", TIMEOUT_S)
    first.wait_for("step 5/", TIMEOUT_S)
    host2.kill()
    first.wait_for("resumed in another layout: 1 process.*; was 2 processes", TIMEOUT_S)
    alone_since = steps_logged(run)
    first.wait_for(rf"step {alone_since + 3}/", TIMEOUT_S)

    host2.boot()
    second = launch(host2, config)
    first.wait_for("resumed in another layout: 2 processes.*; was 1 process", TIMEOUT_S)
    together_since = steps_logged(run)
    first.wait_for(rf"step {together_since + 5}/", TIMEOUT_S)
    for launcher in (first, second):
        launcher.terminate()
    first.wait(TIMEOUT_S)
    second.wait(TIMEOUT_S)

    lines = metrics_lines(run)
    assert last_state(run).progress.step == len(lines), first.read_log()  # stopped, and saved
    undisturbed = tiny_config(data, tmp_path / "runs", *RUN, "run.name=whole", f"train.stop_after_steps={len(lines)}")
    train(undisturbed)
    whole = metrics_lines(RunFolder.of(undisturbed))
    assert [line["step"] for line in lines] == [line["step"] for line in whole]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in whole], rel=1e-4)
