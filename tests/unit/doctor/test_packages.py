"""Versions and shared libraries, with every fault planted in what is installed."""

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import pytest

from distmoe.doctor import packages
from distmoe.doctor.findings import Finding, fail, ok, warn

INSTALLED = {
    "distmoe": "0.1.0",
    "torch": "2.14.1+cpu",
    "torchvision": "0.29.1",
    "numpy": "2.4.6",
    "deepspeed": "0.19.8",
    "ffcv": "1.0.2",
    "accelerate": "1.15.0",
    "pytest": "9.0",
}
REQUIRES = {
    "distmoe": [
        "torch>=2.11",
        "torchvision",
        "numpy>=2",
        "accelerate",
        'ffcv==1.0.*; extra == "ffcv"',
        'deepspeed==0.19.*; extra == "deepspeed"',
        'pytest>=99; extra == "dev"',
    ],
    "torchvision": ["torch==2.14.1", "pillow>=5", 'scipy; extra == "scipy"'],
    "torch": None,
}
SET_UP = "`bash launch/setup.sh`"


class Installation:
    """What importlib.metadata is made to say."""

    def __init__(self) -> None:
        self.versions: dict[str, str] = dict(INSTALLED)
        self.python = ">=3.11,<3.13"

    def version(self, package: str) -> str:
        if package not in self.versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return self.versions[package]

    def requires(self, package: str) -> list[str] | None:
        self.version(package)
        return REQUIRES.get(package, [])

    def metadata(self, package: str) -> dict[str, str]:
        self.version(package)
        return {"Requires-Python": self.python}


@pytest.fixture
def installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Installation:
    """All is well, and nothing is said of exact versions."""
    made = Installation()
    for name in ("version", "requires", "metadata"):
        monkeypatch.setattr(importlib.metadata, name, getattr(made, name))
    monkeypatch.setattr("platform.python_version", lambda: "3.11.7")
    monkeypatch.setattr(packages, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(packages, "_PINS", tmp_path / "launch" / "constraints.txt")
    monkeypatch.setattr("shutil.which", lambda tool, path=None: f"/usr/bin/{tool}")
    set_ffcv(monkeypatch, tmp_path)
    return made


def set_ffcv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, suffix: str = "", error: str = "") -> None:
    """FFCV with a compiled part of this ending, which loads or not."""
    suffix = suffix or importlib.machinery.EXTENSION_SUFFIXES[0]
    folder = tmp_path / "site-packages" / "ffcv"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    (folder / "__init__.py").touch()
    (folder / f"_libffcv{suffix}").touch()
    monkeypatch.setattr(sys, "path", [str(folder.parent), *sys.path])
    monkeypatch.delitem(sys.modules, "ffcv", raising=False)
    importlib.invalidate_caches()

    def load(name: str) -> None:
        assert name == str(folder / f"_libffcv{suffix}")
        if error:
            raise OSError(error)

    monkeypatch.setattr("ctypes.CDLL", load)


def found(subject: str, needs_ffcv: bool | None = None, needs_deepspeed: bool | None = None) -> Finding | None:
    matching = [one for one in packages.examine_packages(needs_ffcv, needs_deepspeed) if one.subject == subject]
    assert len(matching) <= 1
    return matching[0] if matching else None


def test_all_is_well(installation: Installation):
    assert packages.examine_packages(needs_ffcv=None, needs_deepspeed=None) == [
        ok("Python", f"3.11.7, {sys.executable}"),
        ok("distmoe", "0.1.0; torch 2.14.1+cpu, torchvision 0.29.1, numpy 2.4.6 and 3 more are in its ranges"),
        ok("accelerate", "1.15.0"),
        ok("deepspeed", "0.19.8"),
        ok("build tools", "g++ and ninja are here; distmoe compiles nothing, DeepSpeed's operators would be"),
        ok("ffcv", "1.0.2; its shared libraries load"),
    ]


def test_python_out_of_range(installation: Installation, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("platform.python_version", lambda: "3.13.0")
    assert found("Python") == fail(
        "Python",
        f"3.13.0, {sys.executable}; distmoe needs >=3.11,<3.13",
        "rm -rf .venv && PYTHON=/usr/bin/python3.11 bash launch/setup.sh",
    )


VERSIONS: dict[str, tuple[dict[str, str | None], list[Finding]]] = {
    "too old": (
        {"numpy": "1.26.4"},
        [fail("numpy", "1.26.4 is installed, and distmoe 0.1.0 needs >=2", f"{SET_UP}, or pip install 'numpy>=2'")],
    ),
    "of an extra that runs use": (
        {"deepspeed": "0.20.0"},
        [
            fail(
                "deepspeed",
                "0.20.0 is installed, and distmoe 0.1.0 needs ==0.19.*",
                f"{SET_UP}, or pip install 'deepspeed==0.19.*'",
            )
        ],
    ),
    "missing": ({"accelerate": None}, [fail("accelerate", "not installed, and distmoe needs it", SET_UP)]),
    "torchvision of another torch": (
        {"torch": "2.13.0"},
        [
            fail(
                "torch",
                "2.13.0 is installed, and torchvision 0.29.1 needs ==2.14.1",
                f"{SET_UP}, or pip install 'torch==2.14.1'",
            )
        ],
    ),
    "a preview counts as its number": (
        {"torch": "2.14.1.dev1", "torchvision": None},
        [
            fail("torchvision", "not installed, and distmoe needs it", SET_UP),
        ],
    ),
}


@pytest.mark.parametrize("case", VERSIONS)
def test_versions_out_of_range(case: str, installation: Installation):
    changes, expected = VERSIONS[case]
    for name, version in changes.items():
        installation.versions.pop(name)
        if version is not None:
            installation.versions[name] = version
    level = [one for one in packages.examine_packages(None, None) if one.level == "fail"]
    assert level == expected


def test_checkout_that_is_not_installed(installation: Installation):
    del installation.versions["distmoe"]
    assert found("distmoe") == warn(
        "distmoe", "not installed as a package: there are no ranges of versions to compare with", SET_UP
    )


def write_pins(tmp_path: Path, **pins: str) -> None:
    lines = ["# a comment with ==", "nvidia-nccl-cu13==2.30.7", *(f"{name}=={pin}" for name, pin in pins.items())]
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "constraints.txt").write_text("\n".join(lines) + "\n")


def test_exact_versions_beside_a_checkout(installation: Installation, tmp_path: Path):
    write_pins(tmp_path, torch="2.14.1", numpy="2.4.6")
    # What is not installed does not count, and neither does the build after the +.
    assert found("exact versions") == ok("exact versions", "2 packages are as in launch/constraints.txt")


def test_versions_that_differ_from_the_exact_ones(installation: Installation, tmp_path: Path):
    installation.versions |= {f"other{number}": "1.0" for number in range(6)}
    write_pins(tmp_path, numpy="2.4.5", **{f"other{number}": "1.1" for number in range(6)}, torch="2.14.1")
    assert found("exact versions") == warn(
        "exact versions",
        "7 of 8 packages differ from launch/constraints.txt (in brackets): numpy 2.4.6 (2.4.5), other0 1.0 (1.1), "
        "other1 1.0 (1.1), other2 1.0 (1.1), other3 1.0 (1.1) and 2 more",
        f"{SET_UP}; or keep them, if the tests pass: `bash launch/test.sh`",
    )


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [
        (["g++"], "apt-get install -y g++"),
        (["g++", "ninja"], "apt-get install -y g++ && pip install ninja"),
    ],
)
def test_build_tools_are_missed_but_not_needed(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, missing: list[str], remedy: str
):
    monkeypatch.setattr("shutil.which", lambda tool, path=None: None if tool in missing else tool)
    assert found("build tools") == warn(
        "build tools",
        f"{' and '.join(missing)} missing: DeepSpeed's operators cannot be built; distmoe uses none of them",
        remedy,
    )


def test_ninja_of_the_environment_counts(installation: Installation, monkeypatch: pytest.MonkeyPatch):
    own = str(Path(sys.executable).parent)
    monkeypatch.setattr("shutil.which", lambda tool, path=None: tool if tool == "g++" or path == own else None)
    assert found("build tools").level == "ok"


WITHOUT_DEEPSPEED = "pip install 'distmoe[deepspeed]', or set parallel.expert_parallel_size=1 and parallel.zero_stage=0"


def test_deepspeed_that_is_missing(installation: Installation):
    del installation.versions["deepspeed"]
    assert found("deepspeed", needs_deepspeed=True) == fail(
        "deepspeed", "the engine is deepspeed, which is not installed", WITHOUT_DEEPSPEED
    )
    assert found("deepspeed", needs_deepspeed=None) == warn(
        "deepspeed",
        "not installed; experts and optimizer state cannot be spread over processes",
        WITHOUT_DEEPSPEED,
    )
    assert found("deepspeed", needs_deepspeed=False) == ok("deepspeed", "not installed")
    assert found("build tools") is None


WITHOUT_FFCV = f"{SET_UP}, or data.loader=resident, which does without"


def test_ffcv_that_is_missing(installation: Installation):
    del installation.versions["ffcv"]
    assert found("ffcv", needs_ffcv=True) == fail("ffcv", "data.loader is ffcv, which is not installed", WITHOUT_FFCV)
    assert found("ffcv", needs_ffcv=None) == warn("ffcv", "not installed", WITHOUT_FFCV)
    assert found("ffcv", needs_ffcv=False) == ok("ffcv", "not installed")


def test_shared_library_that_ffcv_misses_is_named(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    error = "libopencv_core.so.406: cannot open shared object file: No such file or directory"
    set_ffcv(monkeypatch, tmp_path, error=error)
    library = f"_libffcv{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    assert found("ffcv", needs_ffcv=True) == fail(
        "ffcv", f"1.0.2, but {library} cannot be loaded: {error}", WITHOUT_FFCV
    )
    assert found("ffcv", needs_ffcv=False).level == "ok"


def test_ffcv_built_for_another_python(installation: Installation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    set_ffcv(monkeypatch, tmp_path, suffix=".cpython-38-x86_64-linux-gnu.so")
    assert found("ffcv") == warn("ffcv", "1.0.2, but its library _libffcv is not there for this Python", WITHOUT_FFCV)


def test_this_environment_is_in_its_own_ranges():
    # Unplanted: what is installed here has passed the tests.
    faults: list[Any] = [one for one in packages.examine_packages(None, None) if one.level == "fail"]
    assert faults == []
