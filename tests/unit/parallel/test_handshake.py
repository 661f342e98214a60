"""What processes run, and how it is told when they do not run the same."""

import importlib.metadata
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist

import distmoe
from distmoe.contracts import UserError
from distmoe.parallel import handshake
from distmoe.parallel.signs import empty_signs

CODE = "distmoe's code"


def test_build_names_what_results_depend_on(monkeypatch: pytest.MonkeyPatch):
    real = importlib.metadata.version

    def version(package: str) -> str:
        if package == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    build = handshake.own_build()
    assert build["python"] == platform.python_version()
    assert build["byte order"] == sys.byteorder
    assert build["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert build["numpy"] == numpy.__version__
    assert build["distmoe"] == distmoe.__version__
    assert build["deepspeed"] == "absent"
    assert build.keys() >= {"accelerate", "safetensors", CODE}


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that stands for distmoe, with three modules."""
    root = tmp_path / "distmoe"
    (root / "parallel").mkdir(parents=True)
    for name in ("train.py", "parallel/handshake.py", "parallel/world.py"):
        (root / name).write_text(f"# {name}\n")
    monkeypatch.setattr(handshake, "__file__", str(root / "parallel" / "handshake.py"))
    return root


def digest() -> str:
    handshake._digest_of_sources.cache_clear()
    return handshake.own_build()[CODE]


@pytest.fixture(autouse=True)
def own_digest() -> Any:
    """That of the real sources is kept for a process, and must not stay that of others."""
    yield
    handshake._digest_of_sources.cache_clear()


def test_digest_is_of_the_sources_wherever_they_lie(
    sources: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    before = digest()
    elsewhere = tmp_path_factory.mktemp("other host") / "site-packages"
    shutil.copytree(sources, elsewhere)
    monkeypatch.setattr(handshake, "__file__", str(elsewhere / "parallel" / "handshake.py"))
    assert digest() == before
    (elsewhere / "train.py").write_text("# train,py\n")
    assert digest() != before


CHANGES = {
    "a byte": lambda root: (root / "train.py").write_text("# train.pz\n"),
    "a name": lambda root: (root / "train.py").rename(root / "trains.py"),
    "a folder": lambda root: (root / "train.py").rename(root / "parallel" / "train.py"),
    "another module": lambda root: (root / "new.py").touch(),
    "one less": lambda root: (root / "parallel" / "world.py").unlink(),
    "the border between two": lambda root: (
        (root / "parallel" / "handshake.py").write_text(""),
        (root / "parallel" / "world.py").write_text("# parallel/handshake.py\n# parallel/world.py\n"),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_the_sources_changes_their_digest(change: str, sources: Path):
    before = digest()
    CHANGES[change](sources)
    assert digest() != before


def test_files_that_are_no_modules_do_not_count(sources: Path):
    before = digest()
    (sources / "__pycache__").mkdir()
    (sources / "__pycache__" / "train.cpython-311.pyc").write_bytes(b"compiled")
    (sources / "notes.txt").write_text("of one host")
    (sources / ".ipynb_checkpoints").mkdir()
    (sources / ".ipynb_checkpoints" / "train-checkpoint.py").write_text("# older\n")
    (sources / ".#train.py").symlink_to("user@host.4711:1")  # an editor's lock, a link to nowhere
    assert digest() == before


BUILD = {"python": "3.11.2", "torch": "2.15.0", "numpy": "2.1.0", CODE: "0123456789ab"}


def on(host: str, **changes: str | None) -> dict[str, Any]:
    values = {**BUILD, **changes}
    return {"host": host, "build": {name: value for name, value in values.items() if value is not None}}


# What the ranks run, and what is said of them.
DIFFERENT: dict[str, tuple[list[dict[str, Any] | None], str]] = {
    "one host's torch": (
        [on("a"), on("a"), on("b", torch="2.14.1"), on("b", torch="2.14.1")],
        "rank 2, 3 (host b): torch 2.14.1 instead of 2.15.0",
    ),
    "rank 0 itself": (
        [on("a", numpy="1.9.9"), on("b"), on("c")],
        "rank 1 (host b): numpy 2.1.0 instead of 1.9.9; rank 2 (host c): numpy 2.1.0 instead of 1.9.9",
    ),
    "several packages": (
        [on("a"), on("b", python="3.12.1", numpy="2.2.0")],
        "rank 1 (host b): python 3.12.1 instead of 3.11.2, numpy 2.2.0 instead of 2.1.0",
    ),
    "hosts that differ differently": (
        [on("a"), on("b", **{CODE: "ba9876543210"}), on("c", torch="2.13.0"), on("b", **{CODE: "ba9876543210"})],
        "rank 1, 3 (host b): distmoe's code ba9876543210 instead of 0123456789ab; "
        "rank 2 (host c): torch 2.13.0 instead of 2.15.0",
    ),
    "a package that one lacks": (
        [on("a"), on("b", numpy=None), on("c", deepspeed="0.19.8")],
        "rank 1 (host b): numpy absent instead of 2.1.0; rank 2 (host c): deepspeed 0.19.8 instead of absent",
    ),
    "a version that does not say": ([on("a"), None], "rank 1 (host unknown): another version of distmoe"),
}  # fmt: skip


@pytest.mark.parametrize("case", DIFFERENT)
def test_who_runs_something_else_is_told_with_both_versions(case: str):
    found, said = DIFFERENT[case]
    with pytest.raises(UserError) as error:
        handshake.refuse_differences(found)
    assert str(error.value) == (
        f"hosts do not run the same as rank 0 (host a): {said}. Bring checkout and environment of all hosts to one "
        "state (bash launch/setup.sh), then start again"
    )


def test_equal_builds_are_accepted_on_any_hosts():
    handshake.refuse_differences([on("a"), on("a"), on("b")])


def test_rank_0_reads_what_each_has_published(monkeypatch: pytest.MonkeyPatch):
    store = dist.HashStore()  # type: ignore[attr-defined]
    store.multi_set(*empty_signs(3))
    for rank in range(3):
        handshake.publish_build(store, rank)
    handshake.compare_builds(store, 3)
    monkeypatch.setattr(handshake, "own_build", lambda: {"torch": "1.0"})
    handshake.publish_build(store, 2)
    with pytest.raises(UserError, match=rf"rank 2 \(host {platform.node()}\): python absent instead of .*torch 1\.0 "):
        handshake.compare_builds(store, 3)


def test_rank_that_has_published_nothing_is_of_another_version():
    store = dist.HashStore()  # type: ignore[attr-defined]
    store.multi_set(*empty_signs(2))
    handshake.publish_build(store, 0)
    with pytest.raises(UserError, match=r"rank 1 \(host unknown\): another version of distmoe"):
        handshake.compare_builds(store, 2)
