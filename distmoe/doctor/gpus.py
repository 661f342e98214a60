"""The GPUs, their driver, and whether this build of torch can use them."""

import os
import re
import warnings
from collections import Counter
from pathlib import Path

import torch

from distmoe.doctor.findings import Finding, ok, size, warn
from distmoe.parallel.endings import first_line

_DRIVER = Path("/proc/driver/nvidia/version")
_PCI_DEVICES = Path("/sys/bus/pci/devices")
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # PCI numbers: the vendor, and the class of display and 3D controllers

_SUBJECT = "GPUs"
_ON_CPU = "none: training on the CPU"


def can_use_gpus() -> bool:
    """Whether runs are on GPUs here, see :func:`distmoe.parallel.runtime.choose_device`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a driver that is too old; the finding says so
        return torch.cuda.is_available()


def examine_gpus() -> list[Finding]:
    """The devices with driver, CUDA and NCCL, or why there are none."""
    driver, build = _driver_version(), torch.version.cuda
    if can_use_gpus():
        return [ok(_SUBJECT, _devices()), _libraries(driver, build)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if driver is None and not _has_device():
        return [ok(_SUBJECT, _ON_CPU)]
    if driver is not None and visible is not None and not re.search(r"\d|GPU|MIG", visible.partition("-1")[0]):
        return [ok(_SUBJECT, f"hidden by CUDA_VISIBLE_DEVICES={visible}: training on the CPU")]
    if driver is None:
        return [
            warn(
                _SUBJECT,
                f"{_ON_CPU}: an NVIDIA device is here, but no driver",
                "install the driver, until nvidia-smi lists the device; in a container: docker run --gpus all",
            )
        ]
    if build is None:
        return [
            warn(
                _SUBJECT,
                f"{_ON_CPU}: driver {driver} is here, but torch {torch.__version__} is built without CUDA",
                "install a build with CUDA: `bash launch/setup.sh`, without DISTMOE_TORCH_INDEX_URL",
            )
        ]
    return [
        warn(
            _SUBJECT,
            f"{_ON_CPU}: driver {driver} and torch for CUDA {build} do not work together ({_reason()})",
            f"update the driver to one for CUDA {build}, or install torch for an older CUDA; see what nvidia-smi says",
        )
    ]


def _devices() -> str:
    """Equal devices together: ``8 x NVIDIA H100 80GB HBM3, 79.2 GiB``."""
    properties = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    equal = Counter(f"{one.name}, {size(one.total_memory)}" for one in properties)
    return "; ".join(f"{count} x {device}" for device, count in equal.items())


def _libraries(driver: str | None, build: str | None) -> Finding:
    found = f"driver {driver or 'of unknown version'}, CUDA {build} of torch {torch.__version__}"
    try:
        version = torch.cuda.nccl.version()
    except (AttributeError, RuntimeError):
        return warn(
            "CUDA",
            f"{found}; this build of torch has no NCCL, through which GPUs exchange",
            "install the ordinary build of torch: `bash launch/setup.sh`",
        )
    return ok("CUDA", f"{found}, NCCL {'.'.join(map(str, version))}")


def _driver_version() -> str | None:
    """Of NVIDIA's kernel module, if it is loaded."""
    try:
        text = _DRIVER.read_text()
    except OSError:
        return None
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found.group(1) if found else "of unknown version"


def _has_device() -> bool:
    for device in _PCI_DEVICES.glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text()
        except OSError:
            continue
        if vendor == _NVIDIA and kind.startswith(_DISPLAY):
            return True
    return False


def _reason() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return first_line(str(error))
    return "torch finds no device"
