"""Fixtures for all tests."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# One file of each set that torchvision cannot do without, relative to the data root.
DATA_SETS = {
    "cifar10": "cifar-10-batches-py/test_batch",
    "cifar100": "cifar-100-python/test",
    "mnist": "MNIST/raw/t10k-images-idx3-ubyte",
    "fashionmnist": "FashionMNIST/raw/t10k-images-idx3-ubyte",
}


def real_data_root() -> Path:
    """The folder in which torchvision's files of the real sets may lie."""
    return (REPOSITORY / os.environ.get("DISTMOE_DATA_ROOT", ".data")).resolve()


def why_absent(name: str) -> str | None:
    """The reason to skip a test on the real set ``name``, or None if the set is there."""
    path = real_data_root() / DATA_SETS[name]
    return None if path.exists() else f"no real {name}: {path} does not exist (set DISTMOE_DATA_ROOT)"


@pytest.fixture(scope="session")
def data_root() -> Callable[[str], Path]:
    """``data_root("cifar10")`` is the folder with the real set; without it the test is skipped, with the reason."""

    def find(name: str) -> Path:
        reason = why_absent(name)
        if reason is not None:
            pytest.skip(reason)
        return real_data_root()

    return find
