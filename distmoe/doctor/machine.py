"""This host's processors, memory and limits, beside what the processes of a run need of them."""

import resource
import shutil
from pathlib import Path

import psutil

from distmoe.doctor import cgroups
from distmoe.doctor.findings import Finding, ok, plural, size, warn
from distmoe.parallel.runtime import available_cpus

# Resident memory of a rank was 1.3 GiB with DeepSpeed on CPUs, before any model or data of a size worth mentioning.
_RANK_BYTES = 3 * 2**29
# FFCV keeps its table of samples in shared memory while it prepares data (60,000 samples: 4 MiB); 64 MiB is what
# containers get unasked. With GPUs, NCCL's ranks of one host exchange through it: its manual asks for 1 GiB.
_SHARED_BYTES, _SHARED_GPU_BYTES = 2**26, 2**30
# A rank had 30 open files and 2.5 sockets for every rank of the run; the one that serves the store has 3 more for each.
_OPEN_FILES, _OPEN_FILES_PER_RANK = 256, 8

_SHARED = Path("/dev/shm")
_RDMA_DEVICES = Path("/sys/class/infiniband")


def examine_machine(world_size: int, ranks_here: int, with_gpus: bool) -> list[Finding]:
    """CPUs, memory, shared memory, open files, locked memory.

    Args:
        world_size: Ranks of the run.
        ranks_here: Of them, on this host.
        with_gpus: Whether they use GPUs.
    """
    return [_cpus(), _memory(ranks_here), _shared_memory(with_gpus), _open_files(world_size), _locked_memory()]


def _cpus() -> Finding:
    count, quota = available_cpus(), cgroups.cpu_quota()
    if quota is None or quota >= count:
        return ok("CPUs", f"{count} for this process")
    return warn(
        "CPUs",
        f"{count} for this process, but its control group has the time of {quota:g}: threads beyond that wait",
        f"set train.num_threads to {max(int(quota), 1)} over the number of processes here, or allow more: "
        f"docker run --cpus={count}",
    )


def _memory(ranks_here: int) -> Finding:
    memory, limit = psutil.virtual_memory(), cgroups.memory_limit()
    limited = limit is not None and limit < memory.total
    free = min(memory.available, limit) if limit is not None else memory.available
    found = f"{size(memory.total)}, {size(free)} available"
    found += f", limited to {size(limit)} by the control group" if limited and limit is not None else ""
    needed = ranks_here * _RANK_BYTES
    if free >= needed:
        return ok("memory", found)
    return warn(
        "memory",
        f"{found}; {plural(ranks_here, 'rank')} of this host may need {size(needed)}, besides model and data",
        "start fewer processes on this host, free memory"
        + (", or raise the limit: docker run --memory, srun --mem" if limited else ""),
    )


def _shared_memory(with_gpus: bool) -> Finding:
    subject = str(_SHARED)
    needed = _SHARED_GPU_BYTES if with_gpus else _SHARED_BYTES
    used_by = "NCCL's ranks of one host exchange through it" if with_gpus else "FFCV prepares data with it"
    wanted = "1g" if with_gpus else "64m"
    try:
        usage = shutil.disk_usage(_SHARED)
    except OSError as error:
        return warn(
            subject, f"{error.strerror}; {used_by}", f"mount -t tmpfs -o size={wanted} tmpfs {_SHARED} (as root)"
        )
    found = f"{size(usage.total)}, {size(usage.free)} free"
    if usage.free >= needed:
        return ok(subject, found)
    if usage.total < needed:
        remedy = f"docker run --shm-size={wanted}, or as root: mount -o remount,size={wanted} {_SHARED}"
    else:
        remedy = f"remove what ended processes have left there: ls -l {_SHARED}"
    return warn(subject, f"{found}; {used_by}: {size(needed)} should be free", remedy)


def _open_files(world_size: int) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _OPEN_FILES + _OPEN_FILES_PER_RANK * world_size
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return ok("open files", "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft}")
    if hard == resource.RLIM_INFINITY or hard >= needed:
        remedy = f"ulimit -n {needed}, in the shell or script that launches"
    else:
        remedy = (
            f"the limit cannot be raised beyond {hard} here: nofile in /etc/security/limits.conf, LimitNOFILE= of a "
            f"service, docker run --ulimit nofile={needed}"
        )
    found = f"at most {soft}; in a run of {plural(world_size, 'rank')} each may need {needed}, with its connections"
    return warn("open files", found, remedy)


def _locked_memory() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = "no limit" if soft == resource.RLIM_INFINITY else f"at most {size(soft)}"
    # Memory that GPUs read directly is locked by the driver, which this limit does not bind; buffers of RDMA are.
    if not _RDMA_DEVICES.is_dir() or not any(_RDMA_DEVICES.iterdir()):
        return ok("locked memory", f"{found}; matters to GPUs that exchange by RDMA, and there is no such device")
    if soft == resource.RLIM_INFINITY:
        return ok("locked memory", found)
    remedy = "ulimit -l unlimited, in the shell or script that launches"
    if hard != resource.RLIM_INFINITY:
        remedy = (
            "memlock in /etc/security/limits.conf, LimitMEMLOCK=infinity of a service (slurmd too), "
            "docker run --ulimit memlock=-1"
        )
    return warn("locked memory", f"{found}; NCCL locks its buffers for the RDMA devices here", remedy)
