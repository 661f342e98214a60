"""The loaders, and how the data set of a run is opened with the one its configuration names.

To add a loader, write a class with the two methods of :class:`distmoe.data.loaders.protocol.Loader`, add its name to
``distmoe.config.DataSection.loader`` and its line to :data:`LOADERS`; a unit test checks that the two agree.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from distmoe.config import DataSection
from distmoe.contracts import DataSpec, SplitName, UserError
from distmoe.data.beton import prepare, resident_data
from distmoe.data.loaders.protocol import Loader
from distmoe.data.loaders.resident import ResidentLoader


@dataclass
class OpenData:
    """A data set that is ready to be read.

    Attributes:
        spec: What a model has to know about it.
        fingerprint: Of its contents; equal if and only if the samples are.
        loaders: One for each split; validation is read from ``train``.
        num_samples: Of each split.
    """

    spec: DataSpec
    fingerprint: str
    loaders: dict[SplitName, Loader]
    num_samples: dict[SplitName, int]

    def close(self) -> None:
        """Closes all loaders; safe to call twice."""
        for loader in self.loaders.values():
            loader.close()


def open_data(data: DataSection) -> OpenData:
    """Opens the data set of a run; prepares it first where that has not been done, but never downloads.

    Raises:
        UserError: The original files are missing or damaged, or the loader's package is not installed.
    """
    return LOADERS[data.loader](data)


def _open_ffcv(data: DataSection) -> OpenData:
    try:
        module = importlib.import_module("distmoe.data.loaders.ffcv")
    except (ImportError, OSError) as error:  # OSError: a shared library that FFCV is linked to
        raise UserError(
            f"data.loader is ffcv, but FFCV cannot be imported ({error}): run `bash launch/setup.sh`, which installs "
            f"it, or set data.loader=resident, which needs no extra package"
        ) from error
    prepared = prepare(data)
    return OpenData(
        prepared.spec,
        prepared.fingerprint,
        loaders={name: module.FFCVLoader(split) for name, split in prepared.splits.items()},
        num_samples={name: split.num_samples for name, split in prepared.splits.items()},
    )


def _open_resident(data: DataSection) -> OpenData:
    described, splits = resident_data(data)
    return OpenData(
        described.spec,
        described.fingerprint,
        loaders={name: ResidentLoader(split) for name, split in splits.items()},
        num_samples={name: len(split.labels) for name, split in splits.items()},
    )


LOADERS: dict[str, Callable[[DataSection], OpenData]] = {
    "ffcv": _open_ffcv,
    "resident": _open_resident,
}
