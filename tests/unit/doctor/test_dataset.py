"""Data sets: prepared, original, missing or damaged."""

import logging
from pathlib import Path

import numpy as np
import pytest

from distmoe.config import DataSection
from distmoe.contracts import UserError
from distmoe.data import beton
from distmoe.data.beton import sidecar_of
from distmoe.data.prepared import SideCar, checksum, write_sidecar
from distmoe.data.split import Split
from distmoe.doctor import dataset
from distmoe.doctor.dataset import Dataset, examine_dataset
from distmoe.doctor.findings import Finding, fail, ok, warn
from tests.runs import write_quadrants

PREPARE = "python -m distmoe prepare c.yaml"
MIB = 2**20


def examined(data: DataSection, here: bool = True, several_ranks: bool = False) -> Dataset:
    return examine_dataset(data, PREPARE, here, several_ranks)


@pytest.fixture
def arrays(tmp_path: Path) -> DataSection:
    """200 + 60 images of 8x8x3 bytes."""
    return DataSection(name="arrays", path=str(write_quadrants(tmp_path / "a.npz")), root=str(tmp_path))


def prepare(data: DataSection) -> Path:
    """Files as :func:`distmoe.data.beton.prepare` leaves them, their content aside; returns the training split's."""
    described, _ = beton.resident_data(data)
    for name, split in described.splits.items():
        split.path.write_bytes(name.encode() * 100_000)
    sums = {name: checksum(split.path) for name, split in described.splits.items()}
    original = beton.Original.of(Path(data.path or ""))
    write_sidecar(
        sidecar_of(data),
        SideCar(
            spec=described.spec,
            fingerprint=described.fingerprint,
            splits=described.splits,
            checksums=sums,
            original=original,
        ),
    )
    return described.splits["train"].path


def test_prepared_data_is_enough(arrays: DataSection, tmp_path: Path):
    prepare(arrays)
    found = examined(arrays)
    # 500,000 + 400,000 bytes
    assert found.findings == [ok("prepared data", f"arrays, 200 + 60 samples, 879 KiB in {tmp_path}; whole")]
    assert found.spec is not None
    assert (found.spec.input_shape, found.spec.num_classes, found.unprepared_bytes) == ((3, 8, 8), 4, 0)


def test_data_that_is_not_prepared_yet(arrays: DataSection, tmp_path: Path):
    found = examined(arrays)
    # 200 x 192 and 60 x 192 bytes: each is less than a page of 8 MiB, and one page is begun for the last samples.
    assert found.unprepared_bytes == 32 * MIB + 260 * 128
    written = f"none yet: the first start writes 32 MiB into {tmp_path}"
    original = ok("data set", f"arrays, in {arrays.path}")
    assert found.findings == [original, ok("prepared data", written)]
    assert found.spec is not None
    assert (found.spec.input_shape, found.spec.num_classes) == ((3, 8, 8), 4)
    assert examined(arrays, several_ranks=True).findings == [
        original,
        warn("prepared data", f"{written}, and the other processes wait", PREPARE),
    ]


@pytest.mark.parametrize("fault", ["missing", "damaged", "side-car", "changed"])
def test_prepared_data_that_is_not_whole(
    fault: str, arrays: DataSection, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    train = prepare(arrays)
    reasons = {
        "missing": f"{train} is missing",
        "damaged": f"{train} is damaged (its checksum differs)",
        "side-car": f"{sidecar_of(arrays)} is damaged",
        "changed": f"{arrays.path} has changed since it was prepared",
    }
    if fault == "missing":
        train.unlink()
    elif fault == "damaged":
        train.write_bytes(b"x" * train.stat().st_size)
    elif fault == "side-car":
        sidecar_of(arrays).write_text("{")
    else:
        np.savez(str(arrays.path), inputs=np.zeros((40, 8, 8, 3), np.uint8), labels=np.arange(40) % 2)
    with caplog.at_level(logging.ERROR):
        findings = examined(arrays).findings
    assert [finding.subject for finding in findings] == ["data set", "prepared data"]
    assert findings[1].level == "warn"
    assert findings[1].found.startswith(f"{reasons[fault]}: the first start writes")
    assert findings[1].remedy == PREPARE


def test_too_much_to_be_read_is_looked_at_only(arrays: DataSection, monkeypatch: pytest.MonkeyPatch):
    train = prepare(arrays)
    train.write_bytes(b"x" * train.stat().st_size)
    monkeypatch.setattr(dataset, "_VERIFIED_BYTES", 1000)
    (finding,) = examined(arrays).findings
    assert finding.level == "ok"
    assert finding.found.endswith("; too large to be verified here: training does")
    train.unlink()
    found = examined(arrays)
    assert found.spec is None
    assert found.findings[0].found.endswith(": too large to be verified here, training does")


def test_resident_data_is_not_prepared(arrays: DataSection, tmp_path: Path):
    data = arrays.model_copy(update={"loader": "resident"})
    assert examined(data, several_ranks=True).findings == [ok("data set", f"arrays, in {arrays.path}")]
    assert examined(data).unprepared_bytes == 0


def test_published_data_that_is_missing(tmp_path: Path):
    data = DataSection(name="cifar10", root=str(tmp_path))
    missing = f"data.name=cifar10: original file {tmp_path}/cifar-10-batches-py/data_batch_1 not found"
    assert examined(data) == Dataset([fail("data set", missing, PREPARE)])
    assert examined(data, here=False) == Dataset([warn("data set", missing, PREPARE)])


def test_users_own_data_that_is_missing(tmp_path: Path):
    data = DataSection(name="arrays", path=str(tmp_path / "absent.npz"), root=str(tmp_path))
    message = (
        f"data.path {tmp_path}/absent.npz: does not exist; data.path must name a .npz file as numpy.savez writes it"
    )
    assert examined(data) == Dataset([Finding("fail", "data set", message)])


def test_torchvision_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(data: DataSection, split: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(dataset, "load_split", broken)
    assert examined(DataSection(name="mnist", root=str(tmp_path))) == Dataset(
        [
            fail(
                "data set",
                "mnist cannot be read: RuntimeError: operator torchvision::nms does not exist",
                "see the packages above, then `bash launch/setup.sh`",
            )
        ]
    )


def test_synthetic_data_needs_no_files(tmp_path: Path):
    data = DataSection(name="synthetic", root=str(tmp_path))
    found = examined(data)
    assert found.findings == [
        ok("data set", "synthetic, 20000 + 4000 samples, made on the spot"),
        ok("prepared data", f"none yet: the first start writes 99 MiB into {tmp_path}"),
    ]
    # 3,072 bytes of image and 12 of factors: 20,000 are 7.4 pages, 4,000 are 1.5.
    assert found.unprepared_bytes == (9 + 3) * 8 * MIB + 24_000 * 128
    assert found.spec is not None
    assert (found.spec.input_shape, found.spec.num_classes) == ((3, 32, 32), 10)


def test_border_of_the_model_is_part_of_its_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def load(data: DataSection, split: str) -> Split:
        return Split(np.zeros((10, 28, 28, 1), np.uint8), np.arange(10), {}, tuple("0123456789"))

    monkeypatch.setattr(dataset, "load_split", load)
    spec = examined(DataSection(name="translated_mnist", root=str(tmp_path))).spec
    assert spec is not None
    assert spec.input_shape == (1, 36, 36)


def test_estimate_of_prepared_files_is_close(tmp_path: Path):
    pytest.importorskip("ffcv")
    labels = np.arange(4000) % 10
    np.savez(tmp_path / "a.npz", inputs=np.zeros((4000, 32, 32, 3), np.uint8), labels=labels, factor=labels / 10)
    data = DataSection(name="arrays", path=str(tmp_path / "a.npz"), root=str(tmp_path))
    expected = examined(data).unprepared_bytes
    try:
        prepared = beton.prepare(data)
    except UserError as error:
        pytest.skip(str(error))
    written = sum(split.path.stat().st_size for split in prepared.splits.values())
    assert 0.97 * expected < written <= expected
