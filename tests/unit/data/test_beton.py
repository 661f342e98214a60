"""Preparation: what the files hold, that whole ones are used and damaged ones replaced, and who may write when."""

import contextlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from distmoe.config import DataSection, SyntheticSection
from distmoe.contracts import UserError
from distmoe.data import beton
from distmoe.data.beton import describe, fingerprint, prepare, resident_data
from distmoe.data.datasets import Split, load_split
from tests.conftest import REPOSITORY

pytest.importorskip("ffcv", reason="ffcv is not installed: nothing can be prepared for it")
MIB = 1 << 20


def make_arrays(folder, shape=(6, 5, 3), dtype=np.uint8, num=40, name="a.npz"):
    rng = np.random.default_rng(0)
    inputs = (rng.random((num, *shape)) * 255).astype(dtype)
    path = folder / name
    box = rng.random((num, 2)).astype(np.float32)
    stored = {"inputs": inputs, "labels": np.arange(num) % min(num, 4), "angle": np.linspace(0, 1, num), "box": box}
    if num < 10:  # too few to hold some out
        stored |= {f"test_{key}": values for key, values in stored.items()}
    np.savez(path, **stored)
    return DataSection(name="arrays", path=str(path), prepared_dir=str(folder / "prepared"))


@pytest.fixture
def data(tmp_path):
    return make_arrays(tmp_path)


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def suffixes_in(folder):
    return sorted(name.partition(".")[2] for name in names_in(folder))


WHOLE = ["beton", "beton", "json", "lock"]


@pytest.fixture
def no_originals(monkeypatch):
    """From here on, reading the originals fails the test."""

    def refuse(data, split):
        raise AssertionError(f"the originals of {data.name} were read")

    return lambda: monkeypatch.setattr(beton, "load_split", refuse)


def read_back(split):
    """The fields of a .beton file by their descriptors and pointers, without FFCV's loader."""
    from ffcv.reader import Reader

    reader = Reader(str(split.path))
    content = split.path.read_bytes()
    fields = dict(zip(reader.handlers, reader.metadata.dtype.names, strict=True))

    def pointed(field, dtype, shape):
        pointers = reader.metadata[fields[field]]
        pointers = pointers["data_ptr"] if pointers.dtype.names else pointers
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.stack([np.frombuffer(content[p : p + size], dtype).reshape(shape) for p in map(int, pointers)])

    columns = {"image": pointed("image", split.dtype, split.sample_shape)}
    for field in ("label", "index"):
        columns[field] = reader.metadata[fields[field]].copy()
    for factor, (field, width) in split.factor_fields.items():
        columns[factor] = pointed(field, np.float32, (width,))
    return columns


@pytest.mark.parametrize(
    ("shape", "dtype", "is_rgb"),
    [
        ((6, 5, 3), np.uint8, True),
        ((6, 5, 1), np.uint8, False),
        ((6, 5, 3), np.float32, False),
        ((7,), np.float32, False),
        ((1800, 1700, 3), np.uint8, True),  # 9 MiB: larger than FFCV's usual page
    ],
)
def test_files_hold_every_sample(tmp_path, shape, dtype, is_rgb):
    data = make_arrays(tmp_path, shape, dtype, num=40 if np.prod(shape) < MIB else 2)
    prepared = prepare(data)
    for name, split in prepared.splits.items():
        original = load_split(data, name)
        stored = read_back(split)
        assert split.is_rgb == is_rgb
        assert (split.num_samples, split.sample_shape, split.dtype) == (
            len(original.labels),
            shape,
            np.dtype(dtype).name,
        )
        np.testing.assert_array_equal(stored["image"], original.inputs)
        np.testing.assert_array_equal(stored["label"], original.labels)
        np.testing.assert_array_equal(stored["index"], np.arange(len(original.labels)))
        for factor in ("angle", "box"):
            np.testing.assert_array_equal(stored[factor], original.factors[factor])


def test_prepared_and_resident_data_are_described_alike(data):
    prepared = prepare(data)
    resident, splits = resident_data(data)
    assert resident == prepared == prepare(data)
    assert set(splits) == {"train", "test"}


def test_whole_files_are_used_without_their_originals(data, no_originals, caplog):
    first = prepare(data)
    no_originals()
    Path(data.path).unlink()
    assert prepare(data) == first
    assert "using what was prepared from it" in caplog.text
    assert suffixes_in(data.prepared_dir) == WHOLE


def test_moved_folder_is_found_where_it_is_now(data, no_originals, tmp_path):
    prepare(data)
    Path(data.prepared_dir).rename(tmp_path / "elsewhere")
    no_originals()
    moved = prepare(data.model_copy(update={"prepared_dir": str(tmp_path / "elsewhere")}))
    assert moved.splits["train"].path.parent == tmp_path / "elsewhere"


def test_settings_that_shape_the_data_have_files_of_their_own(tmp_path):
    def section(**settings):
        return DataSection(name="synthetic", root=str(tmp_path), synthetic=SyntheticSection(**settings))

    small = {"train_size": 20, "test_size": 10}
    paths = {prepare(section(**{**small, **change})).splits["train"].path for change in ({}, {"difficulty": 0.6})}
    assert len(paths) == 2
    # What does not shape the stored samples does not ask for new files.
    same = section(**small).model_copy(update={"batch_size": 7, "validation_size": 3})
    assert prepare(same).splits["train"].path in paths


def _flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path):
    path.write_bytes(b"")


def _foreign(path):
    path.write_bytes(b"GIF89a a picture" * 100)


@pytest.mark.parametrize("damage", [_flip_byte, _truncate, _empty, _foreign, Path.unlink])
@pytest.mark.parametrize("split", ["train", "test"])
def test_damaged_file_is_rebuilt(data, caplog, damage, split):
    first = prepare(data)
    path = first.splits[split].path
    whole = path.read_bytes()
    damage(path)
    assert prepare(data) == first
    assert path.read_bytes() == whole
    assert f"prepared file {path} is {'missing' if damage is Path.unlink else 'damaged'}" in caplog.text


def _edit(change):
    def edit(path):
        stored = json.loads(path.read_text())
        change(stored)
        path.write_text(json.dumps(stored))

    return edit


@pytest.mark.parametrize(
    "damage",
    [
        _flip_byte,
        _truncate,
        _empty,
        _foreign,
        lambda path: path.write_text("{}"),
        lambda path: path.write_text("[1, 2]"),
        lambda path: path.write_text("null"),
        lambda path: path.write_text("[" * 100_000),
        _edit(lambda stored: stored.update(checksum="0")),
        _edit(lambda stored: stored.update(content=7)),
        _edit(lambda stored: stored.update(content=stored["content"].replace('num_classes":4', 'num_classes":5'))),
    ],
)
def test_damaged_sidecar_is_rebuilt(data, caplog, damage):
    first = prepare(data)
    (path,) = Path(data.prepared_dir).glob("*.json")
    whole = path.read_text()
    damage(path)
    assert prepare(data) == first
    assert path.read_text() == whole
    assert f"side-car {path} is damaged" in caplog.text


def test_changed_original_is_noticed_and_a_touched_one_is_not(data, caplog):
    first = prepare(data)
    os.utime(data.path, (1, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beton, "load_split", None)
        assert prepare(data) == first
    make_arrays(Path(data.path).parent, num=50)
    with caplog.at_level(logging.INFO):
        second = prepare(data)
    assert second.splits["train"].num_samples == 45
    assert second.fingerprint != first.fingerprint
    assert "has changed since it was prepared" in caplog.text
    assert suffixes_in(data.prepared_dir) == WHOLE


def test_failed_preparation_leaves_nothing_but_the_lock(data):
    make_arrays(Path(data.path).parent, dtype=np.int64)
    with pytest.raises(UserError, match="inputs: type int64"):
        prepare(data)
    assert suffixes_in(data.prepared_dir) == ["lock"]


@contextlib.contextmanager
def largest_file(size):
    """A limit on the size of files stands in for a full disk: Python ignores the signal, the write fails or is cut."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# A file of 40 small samples is 16 MiB (a page of padding, a page of samples) and some tables.
@pytest.mark.parametrize("size", [100, MIB, 12 * MIB, 16 * MIB, 16 * MIB + 200])
def test_full_disk_is_a_user_error_and_leaves_no_partial_file(data, size):
    with largest_file(size), pytest.raises(UserError, match=r"cannot be written into .*prepared.*free some space"):
        prepare(data)
    assert suffixes_in(data.prepared_dir) == ["lock"]
    assert prepare(data).splits["train"].num_samples == 36


def test_full_disk_keeps_what_was_there(data, no_originals):
    first = prepare(data)
    (sidecar,) = Path(data.prepared_dir).glob("*.json")
    whole = {path: path.read_bytes() for path in (split.path for split in first.splits.values())}
    kept = sidecar.read_bytes()
    sidecar.unlink()
    with largest_file(MIB), pytest.raises(UserError):
        prepare(data)
    assert {path: path.read_bytes() for path in whole} == whole
    sidecar.write_bytes(kept)
    no_originals()
    assert prepare(data) == first


def test_folder_that_is_a_file_is_a_user_error(data, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"cannot be written into .*file.*set data\.prepared_dir"):
            prepare(data.model_copy(update={"prepared_dir": str(folder)}))


def test_unwritable_folder_is_a_user_error(data):
    with pytest.raises(UserError, match=r"cannot be written into /proc/prepared .*set data\.prepared_dir"):
        prepare(data.model_copy(update={"prepared_dir": "/proc/prepared"}))


def test_folder_in_the_place_of_a_file_is_a_user_error(data):
    path = prepare(data).splits["train"].path
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="something else is in the place"):
        prepare(data)
    assert not list(Path(data.prepared_dir).glob("*.tmp"))


def test_missing_ffcv_is_a_user_error_with_both_remedies(data, monkeypatch):
    monkeypatch.delitem(sys.modules, "distmoe.data.beton_writer", raising=False)
    monkeypatch.setitem(sys.modules, "distmoe.data.ffcv_package", None)  # what importing a missing module looks like
    with pytest.raises(UserError, match=r"ffcv.*launch/setup\.sh.*data\.loader=resident"):
        prepare(data)
    resident_data(data)


def test_statistics_are_those_of_the_training_images():
    inputs = np.array([[[[0, 10, 7]], [[2, 30, 7]]], [[[4, 10, 7]], [[2, 30, 7]]]], np.uint8)  # (2, 2, 1, 3)
    spec = describe(DataSection(name="cifar10"), Split(inputs, np.array([0, 1]), {}, ("a", "b")))
    assert spec.input_shape == (3, 2, 1)
    assert spec.mean == (2.0, 20.0, 7.0)  # (0 + 2 + 4 + 2) / 4, (10 + 30 + 10 + 30) / 4, 7
    assert spec.std == (2**0.5, 10.0, 1.0)  # (4 + 0 + 4 + 0) / 4 = 2, 10 x 10; a constant channel is divided by 1
    assert (spec.num_classes, spec.class_names) == (2, ("a", "b"))


def test_statistics_of_other_inputs_are_over_all_values():
    inputs = np.array([[1.0, 2.0], [3.0, 6.0]], np.float32)
    spec = describe(DataSection(name="arrays", path="x"), Split(inputs, np.array([0, 1]), {}, ("0", "1")))
    assert (spec.input_shape, spec.mean) == ((2,), (3.0,))
    assert spec.std == pytest.approx((3.5**0.5,))  # (4 + 1 + 0 + 9) / 4


def test_statistics_include_the_border_the_device_adds():
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 256, (50, 28, 28, 1), np.uint8)
    spec = describe(DataSection(name="translated_mnist"), Split(inputs, np.zeros(50, np.int64), {}, ("0",)))
    padded = np.pad(inputs, ((0, 0), (4, 4), (4, 4), (0, 0))).astype(np.float64)
    assert spec.input_shape == (1, 36, 36)
    assert spec.mean == pytest.approx((padded.mean(),), rel=1e-12)
    assert spec.std == pytest.approx((padded.std(),), rel=1e-12)


def test_fingerprint_sees_every_part():
    def split(inputs=0, labels=0, factor=0.0, name="f"):
        images, classes = np.zeros((2, 2), np.uint8), np.zeros(2, np.int64)
        images[1, 1], classes[1] = inputs, labels
        return Split(images, classes, {name: np.full((2, 1), factor, np.float32)})

    plain = split()
    others = [split(inputs=1), split(labels=1), split(factor=1.0), split(name="g")]
    prints = [fingerprint(plain, plain), *(fingerprint(other, plain) for other in others)]
    prints += [fingerprint(plain, other) for other in others]
    assert len(set(prints)) == len(prints)
    assert fingerprint(split(), split()) == prints[0]


# --- several processes

PREPARE = """
    import logging, sys, time
    from distmoe.config import DataSection
    from distmoe.data.beton import prepare

    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s", force=True)
    {before}
    prepared = prepare(DataSection(name="arrays", path=sys.argv[1], prepared_dir=sys.argv[2]))
    loaded = [name for name in ("ffcv", "torchvision") if name in sys.modules]
    print("done", prepared.fingerprint, "loaded", *loaded, flush=True)
"""
STOP_HALF_WAY = """
    from distmoe.data import beton_writer
    encode = beton_writer.handle_sample
    def stop(sample, row, *others):
        encode(sample, row, *others)
        if row == 20:
            print("half way", flush=True)
            time.sleep(300)
    beton_writer.handle_sample = stop
"""


def start(data, before=""):
    script = textwrap.dedent(PREPARE).format(before=textwrap.dedent(before))
    command = [sys.executable, "-c", script, data.path, data.prepared_dir]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def test_killed_writer_is_replaced_by_exactly_one_of_those_that_wait(data):
    processes = [start(data, before=STOP_HALF_WAY)]
    try:
        assert any("half way" in line for line in processes[0].stdout)
        processes += [start(data), start(data)]
        killed, *waiting = processes
        seen = []
        for process in waiting:
            for line in process.stdout:
                seen.append(line)
                if "waiting for another process to finish prepared data arrays-" in line:
                    break
            else:
                raise AssertionError(f"did not wait: {seen}")
        assert suffixes_in(data.prepared_dir) == ["beton.tmp", "lock"]
        killed.send_signal(signal.SIGKILL)
        outputs = [process.communicate(timeout=120)[0] for process in waiting]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [output.count("writing ") for output in outputs] in ([0, 2], [2, 0])  # two files, one writer
    prints = {line.split()[1] for output in outputs for line in output.splitlines() if line.startswith("done")}
    assert prints == {prepare(data).fingerprint}
    assert suffixes_in(data.prepared_dir) == WHOLE


def test_starting_with_whole_files_imports_neither_ffcv_nor_torchvision(data):
    prepare(data)
    output, _ = start(data).communicate(timeout=120)
    assert output.splitlines()[-1].split("loaded")[1] == ""
