"""Prepared data: FFCV's ``.beton`` files, made once and checked at every start.

A data set has two of them, training and test, and one side-car (JSON) that describes both and holds their checksums.
Files that are whole are used as they are, without importing ffcv, without the originals and without writing into the
folder. Otherwise one process writes, under a file lock, to temporary names that are renamed at the end, the side-car
last; the others wait. A process killed at any moment leaves at most temporary files, which the next one replaces.
"""

import contextlib
import errno
import hashlib
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from distmoe.config import DataSection
from distmoe.contracts import SplitName, UserError
from distmoe.data.datasets import load_split
from distmoe.data.disk import flush
from distmoe.data.file_lock import file_lock
from distmoe.data.prepared import (
    Original,
    PreparedData,
    PreparedSplit,
    SideCar,
    checksum,
    read_sidecar,
    write_sidecar,
)
from distmoe.data.split import Split, is_image_shape
from distmoe.data.summary import describe, fingerprint

__all__ = ["PreparedData", "PreparedSplit", "describe", "fingerprint", "prepare", "resident_data", "sidecar_of"]

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1  # raise it when the content or layout of prepared files changes: older files are then left alone
SPLITS: tuple[SplitName, SplitName] = ("train", "test")


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)


def prepare(data: DataSection) -> PreparedData:
    """Makes sure that the prepared files of ``data`` exist and are whole; reads the originals only if they are not.

    Waits while another process prepares the same files.

    Raises:
        UserError: The originals are missing or malformed, the folder cannot be written, the disk is full, or ffcv is
            needed and not installed. Nothing half-written remains.
    """
    sidecar_path = sidecar_of(data)
    found = _find_whole(data, sidecar_path)
    if found is not None:
        return found
    with _disk_errors(sidecar_path.parent):
        sidecar_path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(sidecar_path.with_suffix(".lock"), what=f"prepared data {sidecar_path.stem}"):
            # Another process may have written them while this one waited.
            return _find_whole(data, sidecar_path) or _write(data, sidecar_path)


def resident_data(data: DataSection) -> tuple[PreparedData, dict[SplitName, Split]]:
    """The same description as :func:`prepare`, with the samples themselves, read into memory; ffcv is not needed.

    Raises:
        UserError: The originals are missing or malformed.
    """
    splits = {name: load_split(data, name) for name in SPLITS}
    return _describe(data, splits), splits


def sidecar_of(data: DataSection) -> Path:
    """Where the side-car of prepared data is: ``FOLDER/DATA SET-HASH.json``, of the settings that shape its content."""
    settings: Mapping[str, object] = {}
    if data.name == "synthetic":
        settings = data.synthetic.model_dump()
    elif data.name == "arrays":
        # The file's content is not part of the name but of the side-car: a changed file replaces its prepared data.
        settings = {"path": str(Path(data.path or "").resolve())}
    text = repr((FORMAT_VERSION, data.name, sorted(settings.items())))
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return Path(data.prepared_dir or data.root) / f"{data.name}-{digest}.json"


def _beton_path(sidecar_path: Path, split: SplitName) -> Path:
    return sidecar_path.with_name(f"{sidecar_path.stem}-{split}.beton")


def _describe(data: DataSection, splits: Mapping[SplitName, Split]) -> PreparedData:
    sidecar_path = sidecar_of(data)
    prepared = {}
    for name, split in splits.items():
        shape = split.inputs.shape[1:]
        prepared[name] = PreparedSplit(
            path=_beton_path(sidecar_path, name),
            num_samples=len(split.labels),
            sample_shape=shape,
            dtype=split.inputs.dtype.name,
            is_rgb=is_image_shape(shape) and shape[-1] == 3 and split.inputs.dtype.name == "uint8",
            factor_fields={
                factor: (f"factor{number}", values.shape[1])
                for number, (factor, values) in enumerate(split.factors.items())
            },
        )
    return PreparedData(describe(data, splits["train"]), fingerprint(splits["train"], splits["test"]), prepared)


def _find_whole(data: DataSection, sidecar_path: Path) -> PreparedData | None:
    """The prepared data if side-car and files are whole and the user's original is unchanged; else None."""
    sidecar = read_sidecar(sidecar_path)
    if sidecar is None:
        return None
    if sidecar.original is not None and not sidecar.original.still_is(Path(data.path or "")):
        logger.info("%s has changed since it was prepared: preparing it again", data.path)
        return None
    paths = [sidecar.splits[name].path for name in SPLITS]
    with ThreadPoolExecutor(len(paths)) as pool:  # hashing runs outside of Python's lock
        present = list(pool.map(_checksum_or_none, paths))
    for name, path, found in zip(SPLITS, paths, present, strict=True):
        if found != sidecar.checksums[name]:
            state = "missing or unreadable" if found is None else "damaged (its checksum differs)"
            logger.warning("prepared file %s is %s: preparing it again", path, state)
            return None
    return sidecar.prepared()


def _checksum_or_none(path: Path) -> str | None:
    try:
        return checksum(path)
    except OSError:
        return None


def _write(data: DataSection, sidecar_path: Path) -> PreparedData:
    """Writes both files and their side-car; the caller holds the lock."""
    write_split = _import_writer()
    original = Original.of(Path(data.path)) if data.path and os.path.isfile(data.path) else None
    splits = {name: load_split(data, name) for name in SPLITS}
    prepared = _describe(data, splits)
    # The lock lets only one process write, so the names are fixed: they replace what a killed writer left.
    temporary = {name: target.path.with_suffix(".beton.tmp") for name, target in prepared.splits.items()}
    try:
        for name, target in prepared.splits.items():
            logger.info("writing %s: %d samples", target.path, target.num_samples)
            write_split(temporary[name], splits[name], target.is_rgb, target.factor_fields)
        checksums = {name: checksum(path) for name, path in temporary.items()}
        for name, target in prepared.splits.items():
            os.replace(temporary[name], target.path)
        flush(sidecar_path.parent)
        write_sidecar(
            sidecar_path,
            SideCar(
                spec=prepared.spec,
                fingerprint=prepared.fingerprint,
                splits=prepared.splits,
                checksums=checksums,
                original=original,
            ),
        )
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink()
    return prepared


def _import_writer() -> Callable[[Path, Split, bool, Mapping[str, tuple[str, int]]], None]:
    try:
        write_split: Callable[..., None] = importlib.import_module("distmoe.data.beton_writer").write
    except (ImportError, OSError) as error:  # OSError: a shared library that ffcv loads is gone
        raise UserError(
            f"data.loader=ffcv needs the package ffcv to prepare its files, and it cannot be imported ({error}); "
            "install it with `bash launch/setup.sh`, or set data.loader=resident, which needs neither"
        ) from error
    return write_split


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turns what can go wrong with a folder into a message for its owner."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            fix = "free some space there, or set data.prepared_dir to a folder with more"
        elif error.errno in _NO_ACCESS:
            fix = "set data.prepared_dir to a folder you may write"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            fix = "something else is in the place of a folder or file: move it, or set data.prepared_dir elsewhere"
        else:
            fix = "set data.prepared_dir to a folder on another disk, or data.loader=resident, which writes nothing"
        reason = error.strerror or type(error).__name__
        where = f" at {error.filename}" if error.filename else ""
        raise UserError(f"prepared data cannot be written into {folder} ({reason}{where}); {fix}") from error
