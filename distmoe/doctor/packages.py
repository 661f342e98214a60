"""The interpreter and the packages: what is installed, whether it fits together, and whether FFCV's libraries load."""

import ctypes
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from distmoe.doctor.findings import Finding, Level, fail, ok, warn

_OWN = "distmoe"
_EXTRAS = ("ffcv", "deepspeed")  # those that runs use
_CHECKOUT = Path(__file__).resolve().parents[2]
_PINS = _CHECKOUT / "launch" / "constraints.txt"
_SET_UP = "bash launch/setup.sh"
_NAMED = ("torch", "torchvision", "numpy")
_NAMED_AT_MOST = 5  # packages in one line
_BUILD_TOOLS = ("g++", "ninja")


def examine_packages(needs_ffcv: bool | None, needs_deepspeed: bool | None) -> list[Finding]:
    """Python, the packages of a run and their versions.

    Args:
        needs_ffcv: Whether the run reads data with FFCV; None: it is not known.
        needs_deepspeed: Whether its engine is DeepSpeed; None: it is not known.
    """
    return [
        *_python_and_ranges(),
        *_pinned_versions(),
        ok("accelerate", version_of("accelerate") or "not installed"),
        *_deepspeed(needs_deepspeed),
        _ffcv(needs_ffcv),
    ]


def version_of(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python_and_ranges() -> Iterator[Finding]:
    """Versions against the ranges that this package's metadata, and that of the packages it needs, allow."""
    python = f"{platform.python_version()}, {sys.executable}"
    try:
        allowed = importlib.metadata.metadata(_OWN)["Requires-Python"] or ""
        requirements = list(_requirements(_OWN))
    except importlib.metadata.PackageNotFoundError:
        yield ok("Python", python)
        yield warn(_OWN, "not installed as a package: there are no ranges of versions to compare with", f"`{_SET_UP}`")
        return
    if SpecifierSet(allowed).contains(platform.python_version(), prereleases=True):
        yield ok("Python", python)
    else:
        yield fail(
            "Python", f"{python}; {_OWN} needs {allowed}", f"rm -rf .venv && PYTHON=/usr/bin/python3.11 {_SET_UP}"
        )
    needed = {requirement.name for requirement in requirements}
    # What a package needs of another one that is used here too, such as torchvision of torch.
    among = [(name, one) for name in sorted(needed) for one in _requirements(name) if one.name in needed]
    broken = [*_unmet(_OWN, requirements)]
    for name, requirement in among:
        broken += _unmet(name, [requirement])
    yield from broken
    if not broken:
        named = ", ".join(f"{name} {version_of(name)}" for name in _NAMED)
        yield ok(_OWN, f"{version_of(_OWN)}; {named} and {len(needed) - len(_NAMED)} more are in its ranges")


def _requirements(package: str) -> Iterator[Requirement]:
    """What an installed package requires, of this package with the extras that runs use."""
    extras = ("", *_EXTRAS) if package == _OWN else ("",)
    try:
        texts = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        if package == _OWN:
            raise
        return
    for requirement in map(Requirement, texts):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            yield requirement


def _unmet(package: str, requirements: list[Requirement]) -> Iterator[Finding]:
    for requirement in requirements:
        installed = version_of(requirement.name)
        if installed is None:
            if requirement.name not in _EXTRAS and package == _OWN:
                yield fail(requirement.name, f"not installed, and {package} needs it", f"`{_SET_UP}`")
        elif not requirement.specifier.contains(installed, prereleases=True):
            yield fail(
                requirement.name,
                f"{installed} is installed, and {package} {version_of(package)} needs {requirement.specifier}",
                f"`{_SET_UP}`, or pip install '{requirement.name}{requirement.specifier}'",
            )


def _pinned_versions() -> Iterator[Finding]:
    """Beside a checkout's list of exact versions, the one installation that is known to work."""
    try:
        lines = _PINS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    pins = [line.split("==", 1) for line in map(str.strip, lines) if "==" in line and not line.startswith("#")]
    found = [(name, version_of(name), pin) for name, pin in pins]
    present = [(name, version, pin) for name, version, pin in found if version is not None]
    other = [
        f"{name} {version} ({pin})"
        for name, version, pin in present
        if not SpecifierSet(f"=={pin}").contains(version, prereleases=True)
    ]
    where = _PINS.relative_to(_CHECKOUT)
    if not other:
        yield ok("exact versions", f"{len(present)} packages are as in {where}")
        return
    more = f" and {len(other) - _NAMED_AT_MOST} more" if len(other) > _NAMED_AT_MOST else ""
    yield warn(
        "exact versions",
        f"{len(other)} of {len(present)} packages differ from {where} (in brackets): "
        f"{', '.join(other[:_NAMED_AT_MOST])}{more}",
        f"`{_SET_UP}`; or keep them, if the tests pass: `bash launch/test.sh`",
    )


def _deepspeed(needed: bool | None) -> Iterator[Finding]:
    version = version_of("deepspeed")
    if version is None:
        level: Level = "fail" if needed else "ok" if needed is False else "warn"
        found = "the engine is deepspeed, which is not installed" if needed else "not installed"
        found += "; experts and optimizer state cannot be spread over processes" if needed is None else ""
        remedy = (
            "pip install 'distmoe[deepspeed]', or set parallel.expert_parallel_size=1 and parallel.zero_stage=0"
            if level != "ok"
            else ""
        )
        yield Finding(level, "deepspeed", found, remedy)
        return
    yield ok("deepspeed", version)
    own = os.path.dirname(sys.executable)
    missing = [tool for tool in _BUILD_TOOLS if shutil.which(tool) is None and shutil.which(tool, path=own) is None]
    if not missing:
        yield ok("build tools", "g++ and ninja are here; distmoe compiles nothing, DeepSpeed's operators would be")
        return
    remedies = {"g++": "apt-get install -y g++", "ninja": "pip install ninja"}
    yield warn(
        "build tools",
        f"{' and '.join(missing)} missing: DeepSpeed's operators cannot be built; distmoe uses none of them",
        " && ".join(remedies[tool] for tool in missing),
    )


def _ffcv(needed: bool | None) -> Finding:
    version = version_of("ffcv")
    bad: Level = "fail" if needed else "ok" if needed is False else "warn"
    remedy = f"`{_SET_UP}`, or data.loader=resident, which does without" if bad != "ok" else ""
    if version is None:
        found = "data.loader is ffcv, which is not installed" if needed else "not installed"
        return Finding(bad, "ffcv", found, remedy)
    library = _ffcv_library()
    if library is None:
        return Finding(bad, "ffcv", f"{version}, but its library _libffcv is not there for this Python", remedy)
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return Finding(bad, "ffcv", f"{version}, but {library.name} cannot be loaded: {error}", remedy)
    return ok("ffcv", f"{version}; its shared libraries load")


def _ffcv_library() -> Path | None:
    """Its compiled part; found without importing ffcv, which takes seconds."""
    spec = importlib.util.find_spec("ffcv")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            library = Path(folder) / f"_libffcv{suffix}"
            if library.exists():
                return library
    return None
