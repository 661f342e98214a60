"""What control groups allow this process: containers and batch systems set limits that ``free`` and ``nproc`` hide.

Both versions are read, also side by side. A group above this process's own may have a limit, so the least one counts.
In a container the path that the kernel names may not be there below the mount: then the mount itself is its group.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

Number = TypeVar("Number", int, float)

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")

_UNLIMITED_BYTES = 1 << 60  # version 1 says "no limit" by a number close to 2^63


def memory_limit() -> int | None:
    """Bytes, or None where no group has a limit."""
    limits = [
        *_values("memory.max", "", _bytes),
        *_values("memory.limit_in_bytes", "memory", _bytes),
    ]
    return min((limit for limit in limits if limit < _UNLIMITED_BYTES), default=None)


def cpu_quota() -> float | None:
    """CPUs' worth of time that the groups allow, or None where they do not limit it."""
    quotas = [
        *_values("cpu.max", "", _quota),
        *_values("cpu.cfs_quota_us", "cpu", _old_quota),
    ]
    return min((quota for quota in quotas if quota > 0), default=None)


def _values(name: str, controller: str, read: Callable[[Path], Number | None]) -> Iterator[Number]:
    """What the files of this name hold, from this process's group upwards; an empty controller means version 2."""
    for folder in _groups(controller):
        try:
            value = read(folder / name)
        except (OSError, ValueError):
            continue
        if value is not None:
            yield value


def _groups(controller: str) -> Iterator[Path]:
    path = _membership().get(controller)
    mounts = [ROOT / controller] if controller else [ROOT, ROOT / "unified"]
    for mount in mounts:
        group = mount / (path or "").strip("/")
        yield from (folder for folder in (group, *group.parents) if folder == mount or mount in folder.parents)


def _membership() -> dict[str, str]:
    """Path of this process's group by controller; "" stands for version 2."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        return {}
    paths = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            paths[controller] = path
    return paths


def _bytes(path: Path) -> int | None:
    text = path.read_text().strip()
    return None if text == "max" else int(text)


def _quota(path: Path) -> float | None:
    quota, period = path.read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def _old_quota(path: Path) -> float | None:
    quota = int(path.read_text())
    return None if quota < 0 else quota / int(path.with_name("cpu.cfs_period_us").read_text())
