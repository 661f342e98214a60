"""CIFAR-10, CIFAR-100, MNIST and FashionMNIST, read and checked by torchvision.

Imported only when one of these sets is used (see :mod:`distmoe.data.datasets`). The CIFAR files are checked against
their published MD5 sums before anything is unpickled; torchvision keeps no sums of the unpacked MNIST files, which are
checked for their shape, number and labels.
"""

import logging
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, FashionMNIST
from torchvision.datasets.utils import check_integrity

from distmoe.config import DataSection
from distmoe.contracts import SplitName, UserError
from distmoe.data.split import Split

logger = logging.getLogger(__name__)

_CLASSES: dict[str, Any] = {
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
    "mnist": MNIST,
    "translated_mnist": MNIST,
    "fashionmnist": FashionMNIST,
}
_NUM_SAMPLES: dict[str, dict[SplitName, int]] = {
    "cifar10": {"train": 50_000, "test": 10_000},
    "cifar100": {"train": 50_000, "test": 10_000},
    "mnist": {"train": 60_000, "test": 10_000},
    "translated_mnist": {"train": 60_000, "test": 10_000},
    "fashionmnist": {"train": 60_000, "test": 10_000},
}
_NETWORK_TIMEOUT_S = 30.0  # without it, a network that swallows packets would hang the download for ever
_FIX = "`python -m distmoe prepare CONFIG` downloads it"
_REASON_LENGTH = 300  # characters of another package's error message that are passed on


def load(data: DataSection, split: SplitName) -> Split:
    """Reads one split from ``data.root``; never downloads.

    Returns:
        Images (N, 32, 32, 3) or (N, 28, 28, 1) uint8, no factors.

    Raises:
        UserError: A file is missing, damaged, or not what torchvision expects; the message names it and the fix.
    """
    files = _files(data)
    for path in files:
        _check_present(data, path)
    try:
        original = _CLASSES[data.name](data.root, train=split == "train", download=False)
        inputs, labels = np.asarray(original.data), np.asarray(original.targets, dtype=np.int64)
    except Exception as error:  # torchvision lets anything out of a malformed file: KeyError, AssertionError, ...
        for path, md5 in files.items():
            _check_sum(data, path, md5)
        raise UserError(_malformed(data, split, f"{type(error).__name__}: {error}")) from error
    inputs = np.ascontiguousarray(inputs if inputs.ndim == 4 else inputs[..., None])
    names = tuple(str(name).partition(" - ")[0] for name in original.classes)  # MNIST's are "0 - zero"
    expected = (_NUM_SAMPLES[data.name][split], *((32, 32, 3) if _have_sums(files) else (28, 28, 1)))
    if inputs.shape != expected or inputs.dtype != np.uint8 or labels.shape != expected[:1]:
        found = f"images {inputs.shape} {inputs.dtype} and {labels.size} labels, not {expected} uint8"
        raise UserError(_malformed(data, split, found))
    if labels.min() < 0 or labels.max() >= len(names):
        raise UserError(_malformed(data, split, f"labels {labels.min()}..{labels.max()}, not 0..{len(names) - 1}"))
    return Split(inputs=inputs, labels=labels, class_names=names)


def download(data: DataSection) -> None:
    """Fetches what is missing or damaged in ``data.root``.

    Raises:
        UserError: No network, no space, an unwritable folder, or a checksum that differs.
    """
    logger.info("data.name=%s: looking for the original files in %s, downloading what is missing", data.name, data.root)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_NETWORK_TIMEOUT_S)
    try:
        Path(data.root).mkdir(parents=True, exist_ok=True)
        _CLASSES[data.name](data.root, train=True, download=True)
    except Exception as error:  # URLError, timeouts, RuntimeError for a checksum, OSError of the disk, EOFError, ...
        raise UserError(
            f"data.name={data.name}: download into data.root {data.root} failed "
            f"({_shorten(f'{type(error).__name__}: {error}')}); check the network, the folder and its free space, "
            f"or copy the original files to {_folder(data)} by hand"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _folder(data: DataSection) -> Path:
    kind = _CLASSES[data.name]
    return Path(data.root) / (f"{kind.__name__}/raw" if issubclass(kind, MNIST) else kind.base_folder)


def _files(data: DataSection) -> dict[Path, str | None]:
    """The original files, and their MD5 sums where they are known."""
    kind = _CLASSES[data.name]
    if issubclass(kind, MNIST):
        return {_folder(data) / url.removesuffix(".gz"): None for url, _ in kind.resources}
    listed = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    return {_folder(data) / name: md5 for name, md5 in listed}


def _check_present(data: DataSection, path: Path) -> None:
    if not os.path.isfile(path):  # Path.is_file raises where a name is too long
        raise UserError(
            f"data.name={data.name}: original file {path} not found; data.root ({data.root}) must hold the set in "
            f"torchvision's layout; {_FIX}"
        )
    if not os.access(path, os.R_OK):
        raise UserError(f"data.name={data.name}: original file {path} may not be read; mend its access rights")


def _check_sum(data: DataSection, path: Path, md5: str | None) -> None:
    if md5 and not check_integrity(path, md5):
        raise UserError(
            f"data.name={data.name}: {path} differs from its published checksum, it is damaged or another file; "
            f"delete it, then {_FIX}"
        )


def _have_sums(files: dict[Path, str | None]) -> bool:
    """Whether torchvision knows a checksum of each unpacked file: of CIFAR yes, of MNIST no."""
    return all(files.values())


def _malformed(data: DataSection, split: SplitName, reason: str) -> str:
    stem = "train" if split == "train" else "t10k"
    files = _files(data)
    names = " or ".join(str(path) for path in files if _have_sums(files) or path.name.startswith(stem))
    return f"data.name={data.name}: {names} is damaged or another file ({_shorten(reason)}); delete it, then {_FIX}"


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _REASON_LENGTH else text[: _REASON_LENGTH - 3] + "..."
