"""GPUs, their driver and torch's build, with every mismatch planted; no GPU is needed."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distmoe.doctor import gpus
from distmoe.doctor.findings import ok, warn

DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12\n"
NONE = "none: training on the CPU"


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without device and driver, and torch for CUDA 13.0."""
    monkeypatch.setattr(gpus, "_DRIVER", tmp_path / "driver")
    monkeypatch.setattr(gpus, "_PCI_DEVICES", tmp_path / "pci")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.__version__", "2.14.1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def add_device(tmp_path: Path, vendor: str = "0x10de", kind: str = "0x030200") -> None:
    device = tmp_path / "pci" / "0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(vendor + "\n")
    (device / "class").write_text(kind + "\n")


def test_no_gpu():
    assert gpus.examine_gpus() == [ok("GPUs", NONE)]


@pytest.mark.parametrize(("vendor", "kind"), [("0x1af4", "0x030000"), ("0x10de", "0x020700")])
def test_other_devices_are_no_gpus(vendor: str, kind: str, tmp_path: Path):
    add_device(tmp_path, vendor, kind)  # a virtual display; a network card of NVIDIA's
    assert gpus.examine_gpus() == [ok("GPUs", NONE)]


def test_device_without_driver(tmp_path: Path):
    add_device(tmp_path)
    assert gpus.examine_gpus() == [
        warn(
            "GPUs",
            f"{NONE}: an NVIDIA device is here, but no driver",
            "install the driver, until nvidia-smi lists the device; in a container: docker run --gpus all",
        )
    ]


def test_driver_without_a_cuda_build_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "driver").write_text(DRIVER)
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr("torch.__version__", "2.14.1+cpu")
    assert gpus.examine_gpus() == [
        warn(
            "GPUs",
            f"{NONE}: driver 535.104.05 is here, but torch 2.14.1+cpu is built without CUDA",
            "install a build with CUDA: `bash launch/setup.sh`, without DISTMOE_TORCH_INDEX_URL",
        )
    ]


def test_driver_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nPlease update.")

    (tmp_path / "driver").write_text(DRIVER)
    monkeypatch.setattr("torch.cuda.init", refuse)
    assert gpus.examine_gpus() == [
        warn(
            "GPUs",
            f"{NONE}: driver 535.104.05 and torch for CUDA 13.0 do not work together "
            "(The NVIDIA driver on your system is too old (found version 12020).)",
            "update the driver to one for CUDA 13.0, or install torch for an older CUDA; see what nvidia-smi says",
        )
    ]


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_devices_that_are_hidden_on_purpose(hidden: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "driver").write_text(DRIVER)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert gpus.examine_gpus() == [ok("GPUs", f"hidden by CUDA_VISIBLE_DEVICES={hidden}: training on the CPU")]


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "driver").write_text(DRIVER)
    names = ["NVIDIA H100", "NVIDIA H100", "NVIDIA A100"]
    properties = [SimpleNamespace(name=name, total_memory=80 * 2**30) for name in names]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(properties))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: properties[number])


def test_devices_driver_and_nccl(devices: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 30, 7))
    assert gpus.examine_gpus() == [
        ok("GPUs", "2 x NVIDIA H100, 80.0 GiB; 1 x NVIDIA A100, 80.0 GiB"),
        ok("CUDA", "driver 535.104.05, CUDA 13.0 of torch 2.14.1, NCCL 2.30.7"),
    ]


def test_build_without_nccl(devices: None, monkeypatch: pytest.MonkeyPatch):
    def absent() -> None:
        raise AttributeError("module 'torch._C' has no attribute '_nccl_version'")

    monkeypatch.setattr("torch.cuda.nccl.version", absent)
    found = gpus.examine_gpus()[1]
    assert (found.level, found.remedy) == ("warn", "install the ordinary build of torch: `bash launch/setup.sh`")
    assert found.found.endswith("this build of torch has no NCCL, through which GPUs exchange")


def test_warning_of_torch_is_left_to_the_finding(monkeypatch: pytest.MonkeyPatch):
    def warn_and_refuse() -> bool:
        import warnings

        warnings.warn("CUDA initialization: the driver is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", warn_and_refuse)
    assert not gpus.can_use_gpus()  # warnings are errors here
