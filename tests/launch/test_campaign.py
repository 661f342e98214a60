"""Trainings through faults drawn by a random seed: none hangs, none loses more than it must, all end as if undisturbed.

The short campaign is part of the checks. The long one takes about half an hour of two idle cores and prints a table:

    pytest -m slow tests/launch/test_campaign.py --log-cli-level=INFO

DISTMOE_CAMPAIGN=NUMBER draws other faults than number 0 does.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from distmoe.training.run_folder import RunFolder
from tests.distributed.failing import run_with_fault
from tests.launch.campaign import Recovery, draw, num_steps, run_campaign, table
from tests.launch.faults import KINDS
from tests.launch.hosts import Host, Hosts, why_not
from tests.launch.supervised import SupervisedRun, small_disk
from tests.runs import assert_same_run, write_quadrants, write_tiny_config

pytestmark = pytest.mark.launch

logger = logging.getLogger(__name__)

NUMBER = int(os.environ.get("DISTMOE_CAMPAIGN", "0"))
TIMEOUT_S = 10.0
DISK = "16m"  # more than a run's folder ever holds
REPLICAS, EXPERTS = "parallel.expert_parallel_size=1", "parallel.expert_parallel_size=2"


def overrides(layout: str, num_faults: int) -> tuple[str, ...]:
    return (
        layout,
        f"parallel.timeout_s={TIMEOUT_S}",
        f"train.max_steps={num_steps(num_faults)}",
        "data.batch_size=16",  # ten steps an epoch, which ends with a checkpoint
        "train.checkpoint_every_steps=3",
        "train.evaluate_every_epochs=4",
        "run.keep_checkpoints=3",
        "run.retries=1000000",
    )


def undisturbed(folder: Path, data: Path, layout: str, num_faults: int) -> RunFolder:
    """The same training without a fault, on as many ranks."""
    folder.mkdir()
    outcome = run_with_fault(2, folder, data, None, *overrides(layout, num_faults))
    assert outcome.codes == [0, 0], outcome.log
    return RunFolder(folder / "runs" / "run")


def assert_as_undisturbed(folder: RunFolder, whole: RunFolder) -> None:
    assert_same_run(folder, whole)
    left = {path.name.partition("step-")[0] for path in folder.checkpoints().root.iterdir()}
    assert left <= {"", "damaged-"}, "something half-written is left"


SHORT = ("rank killed", "rank stopped for a while", "rank terminated", "checkpoint with a flipped bit")


def test_training_gets_over_faults(tmp_path: Path):
    data = write_quadrants(tmp_path / "quadrants.npz")
    config = write_tiny_config(data, tmp_path / "runs", *overrides(REPLICAS, len(SHORT)))
    faults = draw(NUMBER, len(SHORT), SHORT, num_hosts=1, num_ranks=2)
    logger.info("campaign %d", NUMBER)
    folder = RunFolder(tmp_path / "runs" / "run")
    run = SupervisedRun(config, folder, tmp_path / "log", timeout_s=TIMEOUT_S)
    with ThreadPoolExecutor() as meanwhile, run:  # the processors have nothing to do while a stopped rank is waited for
        whole = meanwhile.submit(undisturbed, tmp_path / "whole", data, REPLICAS, len(SHORT))
        logger.info("%s", table(list(run_campaign(run, faults))))
        assert_as_undisturbed(folder, whole.result())


@dataclass(frozen=True)
class Training:
    """One of the long campaign; two ranks.

    Attributes:
        layout: An override.
        num_hosts: 2: imitated ones, with a rank on each.
        num_faults: How many.
    """

    layout: str
    num_hosts: int
    num_faults: int


TRAININGS = {
    "replicas": Training(REPLICAS, 1, 30),
    "replicas again": Training(REPLICAS, 1, 30),
    "experts": Training(EXPERTS, 1, 15),
    "replicas on two hosts": Training(REPLICAS, 2, 23),
    "experts on two hosts": Training(EXPERTS, 2, 19),
}


@pytest.fixture(scope="module")
def recoveries() -> Iterator[list[Recovery]]:
    """Of all trainings, for the table at the end."""
    found: list[Recovery] = []
    yield found
    logger.info("campaign %d\n%s", NUMBER, table(found))


def kinds_on(num_hosts: int) -> Sequence[str]:
    """On two hosts, those kinds that are about hosts come twice as often."""
    if num_hosts == 1:
        return [name for name, kind in KINDS.items() if not kind.several_hosts]
    return [*KINDS, *(name for name, kind in KINDS.items() if kind.several_hosts)]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAININGS)
def test_training_gets_over_many_faults(name: str, tmp_path: Path, recoveries: list[Recovery]):
    if reason := why_not():
        pytest.skip(reason)
    training = TRAININGS[name]
    data = write_quadrants(tmp_path / "quadrants.npz")
    drawn = NUMBER * len(TRAININGS) + list(TRAININGS).index(name)
    faults = draw(drawn, training.num_faults, kinds_on(training.num_hosts), training.num_hosts, num_ranks=2)
    logger.info("%s: campaign %d, random seed %d", name, NUMBER, drawn)
    with ExitStack() as stack:
        disk = stack.enter_context(small_disk(tmp_path / "runs", DISK))
        hosts: Sequence[Host] = ()
        if training.num_hosts > 1:
            hosts = list(stack.enter_context(Hosts(training.num_hosts, tmp_path)))
        config = write_tiny_config(data, disk, *overrides(training.layout, training.num_faults))
        folder = RunFolder(disk / "run")
        log = tmp_path / "log"
        run = stack.enter_context(
            SupervisedRun(
                config,
                folder,
                log,
                timeout_s=TIMEOUT_S,
                hosts=hosts,
                ranks_per_host=2 // training.num_hosts,
                disk=disk,
            )
        )
        recoveries.extend(run_campaign(run, faults))
        assert_as_undisturbed(folder, undisturbed(tmp_path / "whole", data, training.layout, training.num_faults))
