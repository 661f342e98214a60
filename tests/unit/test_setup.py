"""launch/setup.sh where there is nothing to install: what it looks at, what it refuses, what it leaves alone."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PROGRAMS = ("bash", "cat", "cut", "dirname", "env", "flock", "id", "paste", "realpath", "sed", "sha256sum", "tr")
NOBODY = 65534


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose set-up is complete by its stamp, with this interpreter's packages."""
    for name in ("launch/setup.sh", "launch/constraints.txt", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    environment = tmp_path / ".venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (environment / "bin" / "python").chmod(0o755)
    (environment / "pyvenv.cfg").write_text(f"command = /usr/bin/python3 -m venv {environment}\n")
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "launch/constraints.txt", "launch/setup.sh"):
        digest.update((tmp_path / name).read_bytes())
    (environment / "distmoe-setup.stamp").write_text(f"{digest.hexdigest()}\ndev\n")
    (tmp_path / "programs").mkdir()
    for name in PROGRAMS:
        (tmp_path / "programs" / name).symlink_to(str(shutil.which(name)))
    return tmp_path


def set_up(
    checkout: Path, *arguments: str, extras: str = "dev", user: int | None = None
) -> subprocess.CompletedProcess[str]:
    """The set-up as it is, with programs on its PATH that can change nothing on this machine."""
    return subprocess.run(
        ["bash", checkout / "launch" / "setup.sh", *arguments],
        env={"PATH": str(checkout / "programs"), "DISTMOE_EXTRAS": extras},
        user=user,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_set_up_that_has_nothing_to_do_writes_nothing(checkout: Path):
    before = sorted(checkout.rglob("*"))
    result = set_up(checkout)
    version = ".".join(str(part) for part in sys.version_info[:3])
    assert (result.returncode, result.stdout) == (0, f"setup: up to date (Python {version}, extras: dev)\n"), (
        result.stderr
    )
    assert sorted(checkout.rglob("*")) == before


def test_system_packages_alone_make_no_environment(checkout: Path):
    (checkout / ".venv" / "distmoe-setup.stamp").unlink()
    before = sorted((checkout / ".venv").rglob("*"))
    result = set_up(checkout, "system-packages", extras="")
    assert (result.returncode, result.stdout) == (0, "setup: system packages: complete\n"), result.stderr
    assert sorted((checkout / ".venv").rglob("*")) == before
    assert not (checkout / ".setup.lock").exists()


@pytest.mark.parametrize("arguments", [["packages"], ["system-packages", "x"], [""]])
def test_set_up_refuses_unknown_arguments(checkout: Path, arguments: list[str]):
    result = set_up(checkout, *arguments)
    assert (result.returncode, result.stdout) == (1, "")
    shown = " ".join(arguments)
    expected = f"setup: error: unknown arguments: {shown}\n       Allowed: none, or system-packages."
    assert result.stderr.startswith(expected)


@pytest.fixture
def foreign(checkout: Path) -> Iterator[Path]:
    """The same where another user, or this one where it is not root, may read but not write."""
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    shutil.copytree(checkout, folder, dirs_exist_ok=True, symlinks=True)
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_set_up_that_may_not_write_says_so(foreign: Path):
    user = NOBODY if os.getuid() == 0 else os.getuid()
    result = set_up(foreign, extras="dev,peers", user=user)
    expected = [
        f"setup: error: {foreign}/.venv lacks some of the extras [dev,peers] or is out of date, and user {user} ",
        "Run this as its owner; in an image, build it with them: --build-arg DISTMOE_EXTRAS=dev,peers",
    ]
    assert result.returncode == 1
    assert [
        line.strip()[: len(text)] for line, text in zip(result.stderr.splitlines(), expected, strict=True)
    ] == expected
    assert not (foreign / ".setup.lock").exists()
