"""The data set of a run: whether its files are there, prepared or original, and what they need on disk."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from distmoe.config import DataSection
from distmoe.contracts import DataSpec, UserError
from distmoe.data.beton import SPLITS, sidecar_of
from distmoe.data.datasets import DATASETS, load_split
from distmoe.data.prepared import SideCar, checksum, read_sidecar
from distmoe.data.split import is_image_shape
from distmoe.data.synthetic import CLASS_NAMES, SIZE
from distmoe.doctor.findings import Finding, Level, ok, size, warn

_VERIFIED_BYTES = 2**30  # read within two seconds or so; of more, only the presence is checked
# A .beton file is whole pages, one of them for every field's last samples, and a table of the samples.
_PAGE_BYTES, _TABLE_BYTES = 2**23, 128
_SYNTHETIC_FACTOR_BYTES = 12


@dataclass(frozen=True)
class Dataset:
    """What is known of a data set without preparing it.

    Attributes:
        findings: On its files.
        spec: Shapes as a model has to know them; None where the files do not tell.
        unprepared_bytes: Of the files that preparing it will write; 0 where they are there, or are not needed.
    """

    findings: list[Finding] = field(default_factory=list)
    spec: DataSpec | None = None
    unprepared_bytes: int = 0


def examine_dataset(data: DataSection, prepare: str, here: bool, several_ranks: bool) -> Dataset:
    """Looks for prepared files, and where there are none, or they are not used, for the original ones.

    Args:
        data: Section of the run.
        prepare: The command that downloads and prepares it.
        here: Whether the run is to be on this machine; otherwise what is missing need not be here.
        several_ranks: Whether all but one would wait for the data to be prepared.
    """
    if data.loader == "resident":
        return replace(_originals(data, prepare, here), unprepared_bytes=0)
    sidecar, reason = _whole(data)
    folder = sidecar_of(data).parent
    if sidecar is not None:
        num_bytes = sum(split.path.stat().st_size for split in sidecar.splits.values())
        samples = " + ".join(str(sidecar.splits[name].num_samples) for name in SPLITS)
        whole = "whole" if num_bytes <= _VERIFIED_BYTES else "too large to be verified here: training does"
        found = f"{data.name}, {samples} samples, {size(num_bytes)} in {folder}; {whole}"
        return Dataset([ok("prepared data", found)], sidecar.spec)
    originals = _originals(data, prepare, here)
    if any(finding.level != "ok" for finding in originals.findings):
        return originals
    found = f"{reason}: the first start writes {size(originals.unprepared_bytes)} into {folder}"
    if several_ranks or sidecar_of(data).exists():
        finding = warn("prepared data", f"{found}, and the other processes wait", prepare)
    else:
        finding = ok("prepared data", found)
    return Dataset([*originals.findings, finding], originals.spec, originals.unprepared_bytes)


def _whole(data: DataSection) -> tuple[SideCar | None, str]:
    """What training would find prepared, or why there is nothing."""
    path = sidecar_of(data)
    if not path.exists():
        return None, "none yet"
    sidecar = read_sidecar(path)
    if sidecar is None:
        return None, f"{path} is damaged"
    if sidecar.original is not None and not sidecar.original.still_is(Path(data.path or "")):
        return None, f"{data.path} has changed since it was prepared"
    files = {name: split.path for name, split in sidecar.splits.items()}
    for file in files.values():
        if not file.is_file():
            return None, f"{file} is missing"
    if sum(file.stat().st_size for file in files.values()) <= _VERIFIED_BYTES:
        for name, file in files.items():
            if checksum(file) != sidecar.checksums[name]:
                return None, f"{file} is damaged (its checksum differs)"
    return sidecar, ""


def _originals(data: DataSection, prepare: str, here: bool) -> Dataset:
    """The original files; of sets with checksums all are compared, whichever split is read."""
    subject = "data set"
    bad: Level = "fail" if here else "warn"
    if data.name == "synthetic":
        return _synthetic(data)
    if data.path is not None and _size_of(Path(data.path)) > _VERIFIED_BYTES:
        num_bytes = _size_of(Path(data.path))
        found = f"{data.path}, {size(num_bytes)}: too large to be verified here, training does"
        return Dataset([ok(subject, found)], None, num_bytes)
    try:
        splits = {"test": load_split(data, "test")}
        if data.loader == "ffcv":  # whose files' size is wanted
            splits["train"] = load_split(data, "train")
    except UserError as error:
        return Dataset([_refused(subject, data, error, prepare, bad)])
    except (ImportError, OSError, RuntimeError) as error:  # what a torchvision of another torch raises on import
        found = f"{data.name} cannot be read: {type(error).__name__}: {error}"
        return Dataset([Finding(bad, subject, found, "see the packages above, then `bash launch/setup.sh`")])
    sample, names = splits["test"].inputs[0], splits["test"].class_names
    sample_bytes = sample.nbytes + sum(values[0].nbytes for values in splits["test"].factors.values())
    return Dataset(
        [ok(subject, f"{data.name}, in {data.path or data.root}")],
        _spec(data, sample.shape, names),
        sum(_file_bytes(len(split.labels), sample_bytes) for split in splits.values()),
    )


def _synthetic(data: DataSection) -> Dataset:
    sizes = (data.synthetic.train_size, data.synthetic.test_size)
    found = f"synthetic, {sizes[0]} + {sizes[1]} samples, made on the spot"
    sample_bytes = SIZE * SIZE * 3 + _SYNTHETIC_FACTOR_BYTES
    return Dataset(
        [ok("data set", found)],
        _spec(data, (SIZE, SIZE, 3), CLASS_NAMES),
        sum(_file_bytes(number, sample_bytes) for number in sizes),
    )


def _refused(subject: str, data: DataSection, error: UserError, prepare: str, bad: Level) -> Finding:
    if not DATASETS[data.name].downloads:
        return Finding(bad, subject, str(error))
    return Finding(bad, subject, str(error).partition("; ")[0], prepare)


def _file_bytes(num_samples: int, sample_bytes: int) -> int:
    pages = math.ceil(num_samples * sample_bytes / _PAGE_BYTES) + 1
    return pages * _PAGE_BYTES + num_samples * _TABLE_BYTES


def _spec(data: DataSection, sample_shape: tuple[int, ...], class_names: tuple[str, ...]) -> DataSpec:
    """Right in its shapes; mean and deviation, for which all samples would have to be read, are not."""
    border = DATASETS[data.name].border
    if is_image_shape(sample_shape):
        height, width, channels = sample_shape
        sample_shape = (channels, height + 2 * border, width + 2 * border)
    values = sample_shape[0] if len(sample_shape) == 3 else 1
    return DataSpec(data.name, sample_shape, len(class_names), class_names, (0.0,) * values, (1.0,) * values)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # reading it says why
        return 0
