"""The Dockerfile and the README's first two commands in fresh Debian roots: 10 to 20 minutes, by hand (``-m slow``)."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.launch, pytest.mark.slow]

SCRIPT = REPOSITORY / "tests" / "launch" / "fresh_root.sh"
TIMEOUT_S = 60 * 60
CANNOT_RUN_HERE = 77
QUICK_S = 120.0  # importing torch from a cold disk on a busy machine is most of it


def proof(name: str, tmp_path: Path) -> Iterator[str]:
    """What the script prints for one of its proofs; skips the tests where the machine cannot give it."""
    log = tmp_path / "log"
    with log.open("w") as output:
        script = subprocess.Popen(
            ["bash", SCRIPT, name],
            env=os.environ | {"TMPDIR": str(tmp_path)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        try:
            code = script.wait(TIMEOUT_S)
        finally:
            script.send_signal(signal.SIGTERM)  # it takes its roots away
            script.wait()
    printed = log.read_text()
    if code == CANNOT_RUN_HERE:
        pytest.skip(printed.strip().splitlines()[-1])
    assert code == 0, printed
    assert [path.name for path in tmp_path.iterdir()] == ["log"]  # the roots are gone
    yield printed


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from proof("image", tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from proof("checkout", tmp_path_factory.mktemp("checkout"))


def section(printed: str, title: str) -> str:
    """What a step printed: from its title to the next one, or to the tables."""
    found = re.search(rf"^### {re.escape(title)}\n(.*?)(?=^### |^load average)", printed, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no step {title} in:\n{printed}"
    return found[1]


def seconds(printed: str, step: str) -> float:
    """The time that the final table gives for a step."""
    return float(re.findall(rf"^ *([\d.]+)  {re.escape(step)}", printed.split("seconds  step\n")[1], re.MULTILINE)[0])


def accuracies(smoke: str) -> tuple[float, float]:
    """Test accuracies of the smoke test's mixture and of one expert alone."""
    found = re.search(r"synthetic set: mixture ([\d.]+), one expert ([\d.]+)", smoke)
    assert found is not None, smoke
    return float(found[1]), float(found[2])


def test_image_is_complete_when_the_sources_come(image: str):
    # The layer of packages is built from an empty package; the sources then find nothing left to install.
    lines = section(image, "image: the Dockerfile, from debian:bookworm-slim").splitlines()
    copied = next(index for index, line in enumerate(lines) if line.endswith(": COPY . ."))
    assert [line for line in lines[:copied] if "setup: ready in" in line]
    after = [line for line in lines[copied:] if line.startswith("setup: ")]
    assert len(after) == 1
    assert "up to date (Python 3.11" in after[0]
    compiled = re.findall(r"^sources compiled: (\d+) of (\d+)$", "\n".join(lines), re.MULTILINE)[0]
    assert compiled[0] == compiled[1] != "0"


def test_readmes_commands_in_the_image(image: str):
    smoke = section(image, "image: bash launch/smoke.sh")
    assert smoke.startswith("setup: up to date")
    assert min(accuracies(smoke)) > 0.9
    assert "experts" in section(image, "image: python -m distmoe plan configs/smoke.yaml")
    assert seconds(image, "image: python -m distmoe plan configs/smoke.yaml") < QUICK_S


def test_any_user_can_train_in_the_image(image: str):
    assert "Usage: " in section(image, "image: no arguments")
    assert "20/20" in section(image, "image: train, as user 4321:4321")
    assert "20/20" in section(image, "image: torchrun, 2 processes, experts sharded, as user 4321:4321")
    assert "all 4 gates passed" in section(image, "image: launch/test.sh with one file of tests, as user 4321:4321")
    owners = section(image, "image: who owns what was written").split("\n")
    assert {"4321:4321 other", "4321:4321 sharded"} < set(owners)
    assert len([line for line in owners if line.startswith("1000:1000 smoke-synthetic-")]) == 2


def test_readmes_commands_on_a_fresh_machine(checkout: str):
    smoke = section(checkout, "checkout: bash launch/smoke.sh, nothing installed")
    assert "setup: system packages: python3 python3-venv python3-dev" in smoke
    assert min(accuracies(smoke)) > 0.9
    assert "experts" in section(checkout, "checkout: python -m distmoe plan configs/smoke.yaml")
    assert seconds(checkout, "checkout: python -m distmoe plan configs/smoke.yaml") < QUICK_S
    assert section(checkout, "checkout: bash launch/setup.sh, nothing to do").startswith("setup: up to date")


def test_unknown_proof_is_refused():
    result = subprocess.run(["bash", SCRIPT, "images"], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "fresh_root.sh: unknown proof 'images'; use image or checkout\n"
