"""Every launcher, as its script starts it, on one host and on several: the layout does not change the model.

Seen from outside, nothing listens where it need not, and what is wrong on one host ends all before anything is written.
"""

import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from distmoe.train import train
from distmoe.training.run_folder import RunFolder
from tests.conftest import REPOSITORY
from tests.launch import ssh
from tests.launch.hosts import Host, Hosts, why_not
from tests.launch.launches import Launch, Outcome
from tests.runs import tiny_config, write_quadrants

pytestmark = pytest.mark.launch
slow = pytest.mark.slow
covered = [slow] if why_not() is None else []  # by a case with several hosts, where those can be imitated

SHARDED = ("parallel.expert_parallel_size=2",)
REPLICAS = ("parallel.backend=replicas",)
SECRETS = {"MLFLOW_TRACKING_TOKEN": "s3cret", "AWS_SECRET_ACCESS_KEY": "s3cret"}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    with Hosts(3, tmp_path_factory.mktemp("hosts")) as three:
        if ssh.why_not() is None:
            ssh.serve_ssh(three)
        yield three


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A name into which shells and pdsh would each read something.
    folder = tmp_path_factory.mktemp("data") / "it's $(touch broken) {a,b} * %h Grüße"
    folder.mkdir()
    return write_quadrants(folder / "quadrants.npz")


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """What one process trains."""
    config = tiny_config(data, tmp_path_factory.mktemp("alone"))
    train(config)
    return RunFolder.of(config)


@pytest.fixture
def launch(tmp_path: Path, data: Path) -> Launch:
    return Launch(tmp_path, data)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize(
    ("script", "overrides", "engine"),
    [
        ("torchrun", REPLICAS, "replicas"),
        pytest.param("accelerate", REPLICAS, "replicas", marks=covered),
        pytest.param("deepspeed", REPLICAS, "replicas", marks=covered),
        *(pytest.param(script, SHARDED, "deepspeed", marks=slow) for script in ("torchrun", "accelerate", "deepspeed")),
    ],
)
def test_two_processes(launch: Launch, alone: RunFolder, script: str, overrides: Sequence[str], engine: str):
    port = ["--port", free_port()] if script == "deepspeed" else []  # the others take any
    outcome = launch.here(launch.command(script, "--processes", 2, *port, overrides=overrides), **SECRETS)
    launch.assert_same_as(alone, outcome, world_size=2, engine=engine)
    assert {address for address, _ in outcome.listening[0]} == {"127.0.0.1"}
    assert "s3cret" not in launch.all_written()


@pytest.mark.parametrize(
    ("script", "number", "ranked", "overrides", "engine"),
    [
        ("torchrun", "2", False, REPLICAS, "replicas"),
        ("accelerate", "2", True, REPLICAS, "replicas"),
        pytest.param("torchrun", "2", True, REPLICAS, "replicas", marks=slow),
        pytest.param("torchrun", "2", False, SHARDED, "deepspeed", marks=slow),
        pytest.param("torchrun", "1:2", False, SHARDED, "deepspeed", marks=slow),
        pytest.param("torchrun", "3", False, REPLICAS, "replicas", marks=slow),
        pytest.param("accelerate", "3", True, REPLICAS, "replicas", marks=slow),
    ],
)
def test_several_hosts(
    launch: Launch,
    alone: RunFolder,
    hosts: Hosts,
    script: str,
    number: str,
    ranked: bool,
    overrides: Sequence[str],
    engine: str,
):
    chosen = list(hosts)[: int(number[-1])]
    options = ["--hosts", number, "--master", "host1"]
    ranks = [["--host-rank", rank] if ranked else [] for rank in range(len(chosen))]
    outcome = launch.on(chosen, [launch.command(script, *options, *rank, overrides=overrides) for rank in ranks])
    launch.assert_same_as(alone, outcome, world_size=len(chosen), engine=engine)
    assert (chosen[0].address, 29500 if script == "accelerate" else 29400) in outcome.listening[0]
    assert_only_own_addresses(chosen, outcome)


def assert_only_own_addresses(hosts: Sequence[Host], outcome: Outcome) -> None:
    """None has listened on all of its addresses."""
    for host, seen in zip(hosts, outcome.listening, strict=True):
        assert {address for address, _ in seen} <= {host.address, "127.0.0.1"}, host.name


@pytest.mark.parametrize(
    ("number", "overrides", "engine"), [(2, SHARDED, "deepspeed"), pytest.param(3, REPLICAS, "replicas", marks=slow)]
)
def test_deepspeed_over_ssh(
    launch: Launch, alone: RunFolder, hosts: Hosts, number: int, overrides: Sequence[str], engine: str
):
    if reason := ssh.why_not():
        pytest.skip(reason)
    chosen = list(hosts)[:number]
    hostfile = launch.folder / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in chosen))
    command = launch.command("deepspeed", "--hostfile", hostfile, overrides=overrides)
    outcome = launch.on(chosen, [command], **SECRETS)
    launch.assert_same_as(alone, outcome, world_size=number, engine=engine)
    assert (chosen[0].address, 29500) in outcome.listening[0]
    assert_only_own_addresses(chosen, outcome)
    assert "s3cret" not in launch.all_written()
    assert not list(REPOSITORY.glob("broken"))


def options_of_pair(script: str, launch: Launch, master: str) -> list[list[object]]:
    """Options with which each of the hosts 1 and 2 takes part; deepspeed is started on the first alone."""
    if script == "deepspeed":
        if reason := ssh.why_not():
            pytest.skip(reason)
        hostfile = launch.folder / "hostfile"
        hostfile.write_text("host1 slots=1\nhost2 slots=1\n")
        return [["--hostfile", hostfile, "--master", master]]
    several: list[object] = ["--hosts", 2, "--master", master]
    if script == "accelerate":
        return [[*several, "--host-rank", 0], [*several, "--host-rank", 1]]
    return [[*several, "--rendezvous", "read_timeout=3"]] * 2


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("torchrun", "rendezvous endpoint (hots1): host host{n} does not know this name"),
        pytest.param("accelerate", "rendezvous endpoint (hots1): host host{n} does not know this name", marks=slow),
        pytest.param("deepspeed", "does not know the name in MASTER_ADDR (hots1", marks=slow),
    ],
)
def test_master_whose_name_is_wrong(launch: Launch, hosts: Hosts, script: str, message: str):
    commands = [launch.command(script, *options) for options in options_of_pair(script, launch, "hots1")]
    outcome = launch.on([hosts[0], hosts[1]], commands)
    assert outcome.codes == [2] * len(commands)
    for number, log in enumerate(outcome.logs, 1):
        assert message.format(n=number) in log
    launch.assert_nothing_written(outcome)
    assert outcome.seconds < 120


PORT_TAKER = "import socket, time; s = socket.create_server(('', {port})); print('taken', flush=True); time.sleep(600)"


@pytest.mark.parametrize(
    ("script", "port", "codes", "messages"),
    [
        (
            "torchrun",
            29400,
            [2, 2],
            ["rendezvous endpoint (host1): the port is taken by another program", "what listens there is no store"],
        ),
        pytest.param(
            "accelerate",
            29500,
            [1, 2],
            ["port `29500`, but another process is utilizing it", "what listens there is no store"],
            marks=slow,
        ),
        pytest.param(
            "deepspeed",
            29500,
            [2],
            ["MASTER_ADDR (host1), MASTER_PORT (29500): the port is taken by another program"],
            marks=slow,
        ),
    ],
)
def test_port_of_the_master_that_is_taken(
    launch: Launch, hosts: Hosts, script: str, port: int, codes: list[int], messages: list[str]
):
    taker = hosts[0].popen(["python", "-IS", "-c", PORT_TAKER.format(port=port)], log=launch.folder / "taker.log")
    taker.wait_for("taken")
    commands = [launch.command(script, *options) for options in options_of_pair(script, launch, "host1")]
    outcome = launch.on([hosts[0], hosts[1]], commands)
    taker.kill()
    assert outcome.codes == codes
    for message, log in zip(messages, outcome.logs, strict=True):
        assert message in log
    launch.assert_nothing_written(outcome)


@pytest.fixture
def checkout_of_yesterday(tmp_path: Path) -> Path:
    """A checkout in which one line of the package differs."""
    checkout = tmp_path / "checkout"
    for name in ("launch", "distmoe"):
        shutil.copytree(REPOSITORY / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (checkout / "distmoe" / "noise.py").open("a") as file:
        file.write("# as of yesterday\n")
    return checkout


@pytest.mark.parametrize("script", ["torchrun", pytest.param("accelerate", marks=slow)])
def test_hosts_with_different_code(launch: Launch, hosts: Hosts, script: str, checkout_of_yesterday: Path):
    first, second = options_of_pair(script, launch, "host1")
    commands = [launch.command(script, *first), launch.command(script, *second, checkout=checkout_of_yesterday)]
    outcome = launch.on([hosts[0], hosts[1]], commands, [REPOSITORY, checkout_of_yesterday])
    launch.assert_nothing_written(outcome)
    assert re.search(
        r"hosts do not run the same as rank [01] \(host host[12]\): rank [01] \(host host[12]\): distmoe's code "
        r"[0-9a-f]{12} instead of [0-9a-f]{12}\. Bring checkout and environment of all hosts to one state",
        "".join(outcome.logs),
    ), "\n".join(outcome.logs)
