"""Where samples come from: one loading function a data set, all giving the same :class:`distmoe.data.split.Split`.

To add a data set, write a module with a function ``load(data, split) -> Split``, add its line to :data:`DATASETS` and
its name to ``distmoe.config.DataName``; a unit test checks that the two agree. Nothing here keeps or caches samples:
:mod:`distmoe.data.beton` writes them once into files that start fast.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from distmoe.config import DataSection
from distmoe.contracts import SplitName
from distmoe.data import arrays, synthetic
from distmoe.data.split import Split

__all__ = ["DATASETS", "Source", "Split", "download", "load_split"]


@dataclass(frozen=True)
class Source:
    """One data set.

    Attributes:
        load: Reads or makes one split.
        downloads: Whether there are original files that :func:`download` can fetch.
        border: Pixels of empty border the device adds on each side of the stored image: the model's input is larger
            than what is stored.
    """

    load: Callable[[DataSection, SplitName], Split]
    downloads: bool = False
    border: int = 0


def _load_torchvision(data: DataSection, split: SplitName) -> Split:
    # torchvision takes a second to import: only those pay who use one of its sets.
    loaded: Split = importlib.import_module("distmoe.data.torchvision_sets").load(data, split)
    return loaded


DATASETS: dict[str, Source] = {
    "cifar10": Source(_load_torchvision, downloads=True),
    "cifar100": Source(_load_torchvision, downloads=True),
    "mnist": Source(_load_torchvision, downloads=True),
    "fashionmnist": Source(_load_torchvision, downloads=True),
    "translated_mnist": Source(_load_torchvision, downloads=True, border=4),
    "synthetic": Source(synthetic.load),
    "arrays": Source(arrays.load),
}


def load_split(data: DataSection, split: SplitName) -> Split:
    """Reads (or makes) one split of the data set ``data.name``, whole, into memory.

    Never downloads.

    Raises:
        UserError: The original files are missing, damaged or malformed; the message names the file and the fix.
    """
    return DATASETS[data.name].load(data, split)


def download(data: DataSection) -> None:
    """Fetches the original files into ``data.root`` where they are missing; sets without originals do nothing.

    For ``prepare`` only: training never touches the network.

    Raises:
        UserError: No network, no space, or what arrived does not have the published checksum.
    """
    if DATASETS[data.name].downloads:
        importlib.import_module("distmoe.data.torchvision_sets").download(data)
