"""What every process runs, compared before they exchange anything: the same code, with the same packages.

Hosts that have been updated at different times would otherwise train with two versions of one formula, or fail in an
exchange long after the start.
"""

import hashlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from distmoe.contracts import UserError
from distmoe.parallel.signs import build_key, listed

_PACKAGES = ("distmoe", "torch", "nvidia-nccl-cu13", "numpy", "accelerate", "deepspeed", "safetensors")
_CODE = "distmoe's code"


def own_build() -> dict[str, str]:
    """What this process runs: versions by name, and a digest of this package's sources."""
    versions = {name: _version(name) for name in _PACKAGES}
    device = "CUDA" if torch.cuda.is_available() else "CPU"
    machine = {"python": platform.python_version(), "byte order": sys.byteorder, "device": device}
    return {**machine, **versions, _CODE: _digest_of_sources()}


def publish_build(store: Any, rank: int) -> None:
    """Leaves in the store what this rank runs."""
    store.set(build_key(rank), json.dumps({"host": platform.node(), "build": own_build()}))


def compare_builds(store: Any, world_size: int) -> None:
    """Reads what all ranks run, each of which has published it; rank 0 does.

    Raises:
        UserError: Some run something else than rank 0; the message says which, and what.
    """
    found = [
        json.loads(text) if text else None for text in store.multi_get([build_key(rank) for rank in range(world_size)])
    ]
    refuse_differences(found)


def refuse_differences(found: Sequence[Mapping[str, Any] | None]) -> None:
    """Compares what the ranks run.

    Args:
        found: By rank: ``host`` and ``build``, see :func:`own_build`; None: of a version that does not say.

    Raises:
        UserError: They do not run the same.
    """
    first = found[0]
    assert first is not None, "rank 0 has published what it runs"
    groups: dict[tuple[str, str], list[int]] = {}  # ranks that differ alike from rank 0, by host
    for rank, other in enumerate(found):
        host = other["host"] if other is not None else "unknown"
        difference = "another version of distmoe" if other is None else _difference(first["build"], other["build"])
        if difference:
            groups.setdefault((host, difference), []).append(rank)
    if groups:
        said = [f"rank {listed(ranks)} (host {host}): {what}" for (host, what), ranks in groups.items()]
        raise UserError(
            f"hosts do not run the same as rank 0 (host {first['host']}): {'; '.join(said)}. Bring checkout and "
            "environment of all hosts to one state (bash launch/setup.sh), then start again"
        )


def _difference(first: Mapping[str, str], other: Mapping[str, str]) -> str:
    names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
    return ", ".join(f"{name} {other.get(name, 'absent')} instead of {first.get(name, 'absent')}" for name in names)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@cache
def _digest_of_sources() -> str:
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    # What cannot be imported is an editor's: copies and locks, some of which are links to nowhere.
    for path in sorted(path for path in root.rglob("*.py") if path.stem.isidentifier()):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
