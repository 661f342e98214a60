"""Processors, memory and limits: with faults planted in what the system says."""

import resource
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from distmoe.doctor import cgroups, machine
from distmoe.doctor.findings import Finding, ok, warn

GIB = 2**30
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def no_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that has enough of everything."""
    monkeypatch.setattr(machine, "available_cpus", lambda: 8)
    monkeypatch.setattr(cgroups, "ROOT", tmp_path / "no cgroups")
    monkeypatch.setattr(machine, "_RDMA_DEVICES", tmp_path / "no devices")
    set_memory(monkeypatch, total=32 * GIB, available=24 * GIB)
    set_shared(monkeypatch, total=16 * GIB, free=15 * GIB)
    set_limits(monkeypatch, resource.RLIM_INFINITY, resource.RLIM_INFINITY)


def set_memory(monkeypatch: pytest.MonkeyPatch, total: int, available: int) -> None:
    reading = SimpleNamespace(total=total, available=available)
    monkeypatch.setattr("psutil.virtual_memory", lambda: reading)


def set_shared(monkeypatch: pytest.MonkeyPatch, total: int, free: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(total, total - free, free))


def set_limits(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda kind: (soft, hard))


def examined(subject: str, world_size: int = 1, ranks_here: int = 1, with_gpus: bool = False) -> Finding:
    (found,) = [one for one in machine.examine_machine(world_size, ranks_here, with_gpus) if one.subject == subject]
    return found


def test_machine_with_enough():
    assert machine.examine_machine(world_size=64, ranks_here=8, with_gpus=True) == [
        ok("CPUs", "8 for this process"),
        ok("memory", "32.0 GiB, 24.0 GiB available"),
        ok("/dev/shm", "16.0 GiB, 15.0 GiB free"),
        ok("open files", "no limit"),
        ok("locked memory", "no limit; matters to GPUs that exchange by RDMA, and there is no such device"),
    ]


def test_cpu_time_of_a_container(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cgroups, "cpu_quota", lambda: 2.5)
    assert examined("CPUs") == warn(
        "CPUs",
        "8 for this process, but its control group has the time of 2.5: threads beyond that wait",
        "set train.num_threads to 2 over the number of processes here, or allow more: docker run --cpus=8",
    )
    monkeypatch.setattr(cgroups, "cpu_quota", lambda: 8.0)
    assert examined("CPUs").level == "ok"


def test_memory_for_the_ranks_of_this_host(monkeypatch: pytest.MonkeyPatch):
    set_memory(monkeypatch, total=32 * GIB, available=6 * GIB)
    assert examined("memory", ranks_here=4).level == "ok"  # 1.5 GiB each
    assert examined("memory", ranks_here=5) == warn(
        "memory",
        "32.0 GiB, 6.0 GiB available; 5 ranks of this host may need 7.5 GiB, besides model and data",
        "start fewer processes on this host, free memory",
    )


def test_memory_limit_of_a_container(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cgroups, "memory_limit", lambda: 4 * GIB)
    assert examined("memory", ranks_here=2) == ok(
        "memory", "32.0 GiB, 4.0 GiB available, limited to 4.0 GiB by the control group"
    )
    found = examined("memory", ranks_here=3)
    assert found.level == "warn"
    assert found.remedy.endswith("or raise the limit: docker run --memory, srun --mem")


def test_shared_memory_too_small_for_gpus(monkeypatch: pytest.MonkeyPatch):
    set_shared(monkeypatch, total=64 * 2**20, free=64 * 2**20)
    assert examined("/dev/shm").level == "ok"
    assert examined("/dev/shm", with_gpus=True) == warn(
        "/dev/shm",
        "64 MiB, 64 MiB free; NCCL's ranks of one host exchange through it: 1.0 GiB should be free",
        "docker run --shm-size=1g, or as root: mount -o remount,size=1g /dev/shm",
    )


def test_shared_memory_filled_by_others(monkeypatch: pytest.MonkeyPatch):
    set_shared(monkeypatch, total=GIB, free=2**20)
    assert examined("/dev/shm") == warn(
        "/dev/shm",
        "1.0 GiB, 1 MiB free; FFCV prepares data with it: 64 MiB should be free",
        "remove what ended processes have left there: ls -l /dev/shm",
    )


def test_shared_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    def absent(path: Path) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("shutil.disk_usage", absent)
    assert examined("/dev/shm") == warn(
        "/dev/shm",
        "No such file or directory; FFCV prepares data with it",
        "mount -t tmpfs -o size=64m tmpfs /dev/shm (as root)",
    )


def test_open_files_for_the_connections_of_a_run(monkeypatch: pytest.MonkeyPatch):
    set_limits(monkeypatch, 1024, 4096)
    assert examined("open files", world_size=96) == ok("open files", "at most 1024")  # 256 + 8 x 96
    assert examined("open files", world_size=97) == warn(
        "open files",
        "at most 1024; in a run of 97 ranks each may need 1032, with its connections",
        "ulimit -n 1032, in the shell or script that launches",
    )
    assert examined("open files", world_size=512).remedy == (
        "the limit cannot be raised beyond 4096 here: nofile in /etc/security/limits.conf, LimitNOFILE= of a service, "
        "docker run --ulimit nofile=4352"
    )


def test_locked_memory_matters_with_rdma(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    set_limits(monkeypatch, 8 * 2**20, resource.RLIM_INFINITY)
    assert examined("locked memory").level == "ok"
    (tmp_path / "infiniband" / "mlx5_0").mkdir(parents=True)
    monkeypatch.setattr(machine, "_RDMA_DEVICES", tmp_path / "infiniband")
    assert examined("locked memory") == warn(
        "locked memory",
        "at most 8 MiB; NCCL locks its buffers for the RDMA devices here",
        "ulimit -l unlimited, in the shell or script that launches",
    )
    set_limits(monkeypatch, 8 * 2**20, 8 * 2**20)
    assert examined("locked memory").remedy == (
        "memlock in /etc/security/limits.conf, LimitMEMLOCK=infinity of a service (slurmd too), "
        "docker run --ulimit memlock=-1"
    )
    set_limits(monkeypatch, resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert examined("locked memory") == ok("locked memory", "no limit")
