"""Limits of control groups, read from trees as kernels and containers show them."""

from pathlib import Path

import pytest

from distmoe.doctor import cgroups

NO_LIMIT = str(2**63 - 4096)  # version 1

TREES = {
    "version 2, no limits": (
        "0::/user/job",
        {"user/job/memory.max": "max", "user/job/cpu.max": "max 100000"},
        None,
        None,
    ),
    "version 2, of its own": (
        "0::/user/job",
        {"user/job/memory.max": "1073741824", "user/job/cpu.max": "150000 100000"},
        2**30,
        1.5,
    ),
    "version 2, the least of the groups above counts": (
        "0::/user/job/step",
        {"user/job/step/memory.max": "max", "user/job/memory.max": "4096000", "user/memory.max": "8192000"},
        4096000,
        None,
    ),
    "version 2 in a container, which sees its own group as the mount": (
        "0::/docker/abc",
        {"memory.max": "2048000", "cpu.max": "50000 100000"},
        2048000,
        0.5,
    ),
    "version 1": (
        "5:memory:/job\n4:cpu,cpuacct:/job",
        {
            "memory/job/memory.limit_in_bytes": "1000000",
            "memory/memory.limit_in_bytes": NO_LIMIT,
            "cpu/job/cpu.cfs_quota_us": "300000",
            "cpu/job/cpu.cfs_period_us": "100000",
        },
        1000000,
        3.0,
    ),
    "version 1, no limits": (
        "5:memory:/\n4:cpu:/",
        {
            "memory/memory.limit_in_bytes": NO_LIMIT,
            "cpu/cpu.cfs_quota_us": "-1",
            "cpu/cpu.cfs_period_us": "100000",
        },
        None,
        None,
    ),
    "both, side by side": (
        "4:memory:/\n0::/job",
        {"memory/memory.limit_in_bytes": "9000", "unified/job/cpu.max": "100000 100000"},
        9000,
        1.0,
    ),
    "nothing there": ("", {}, None, None),
    "nonsense": ("0::/", {"memory.max": "lots", "cpu.max": ""}, None, None),
}


@pytest.mark.parametrize("case", TREES)
def test_limits(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    membership, files, memory, cpus = TREES[case]
    (tmp_path / "membership").write_text(membership + "\n" if membership else "")
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text + "\n")
    monkeypatch.setattr(cgroups, "ROOT", tmp_path / "root")
    monkeypatch.setattr(cgroups, "MEMBERSHIP", tmp_path / "membership")
    assert (cgroups.memory_limit(), cgroups.cpu_quota()) == (memory, cpus)


def test_no_control_groups_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cgroups, "ROOT", tmp_path / "absent")
    monkeypatch.setattr(cgroups, "MEMBERSHIP", tmp_path / "absent")
    assert (cgroups.memory_limit(), cgroups.cpu_quota()) == (None, None)
