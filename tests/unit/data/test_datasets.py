"""Where samples come from: the table of sets, the user's arrays, and torchvision's files, whole and damaged."""

import hashlib
import pickle
import socket
from typing import get_args
from urllib.error import URLError

import numpy as np
import pytest

from distmoe.config import DataName, DataSection
from distmoe.contracts import UserError
from distmoe.data import torchvision_sets
from distmoe.data.datasets import DATASETS, download, load_split


def arrays(path):
    return DataSection(name="arrays", path=str(path))


def good_arrays(num=40, shape=(6, 5, 3), dtype=np.uint8):
    rng = np.random.default_rng(0)
    inputs = (rng.random((num, *shape)) * 255).astype(dtype)
    return {"inputs": inputs, "labels": np.arange(num) % 4, "angle": np.linspace(0, 1, num)}


def test_table_holds_the_names_the_configuration_allows():
    assert set(DATASETS) == set(get_args(DataName))


# --- arrays


@pytest.mark.parametrize("shape", [(6, 5, 3), (6, 5, 1), (7,), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_arrays_split_themselves_without_loss(tmp_path, shape, dtype):
    stored = good_arrays(40, shape, dtype)
    np.savez(tmp_path / "a.npz", **stored)
    train, test = (load_split(arrays(tmp_path / "a.npz"), name) for name in ("train", "test"))
    assert (len(train.labels), len(test.labels)) == (36, 4)
    assert train.inputs.dtype == dtype
    assert train.inputs.shape[1:] == shape
    assert train.labels.dtype == np.int64
    assert train.class_names == ("0", "1", "2", "3")
    # The factor is different for each sample and so tells which one it is.
    angles = np.concatenate([train.factors["angle"], test.factors["angle"]])[:, 0]
    rows = np.argsort(angles)
    np.testing.assert_array_equal(np.concatenate([train.inputs, test.inputs])[rows], stored["inputs"])
    np.testing.assert_array_equal(np.concatenate([train.labels, test.labels])[rows], stored["labels"])
    assert not np.array_equal(test.factors["angle"][:, 0], stored["angle"][-4:].astype(np.float32))
    again = load_split(arrays(tmp_path / "a.npz"), "test")
    np.testing.assert_array_equal(again.inputs, test.inputs)


def test_arrays_may_bring_their_own_test_split(tmp_path):
    train = good_arrays(8)
    train["box"] = np.arange(16).reshape(8, 2)
    test = {f"test_{key}": value[:3] for key, value in train.items()}
    np.savez_compressed(tmp_path / "a.npz", **train, **test)
    split = load_split(arrays(tmp_path / "a.npz"), "test")
    np.testing.assert_array_equal(split.inputs, train["inputs"][:3])
    np.testing.assert_array_equal(split.factors["box"], [[0, 1], [2, 3], [4, 5]])
    assert split.factors["box"].dtype == np.float32
    assert len(load_split(arrays(tmp_path / "a.npz"), "train").labels) == 8


def changed(**changes):
    """The good file with some arrays replaced, or left out where the new value is None."""
    stored = {**good_arrays(), **changes}
    return {key: value for key, value in stored.items() if value is not None}


def with_test(**changes):
    stored = good_arrays()
    return {**stored, **{f"test_{key}": value[:4] for key, value in stored.items()}, **changes}


LABELS = np.arange(40) % 4
INPUTS = good_arrays()["inputs"]
FLOATS = INPUTS.astype(np.float32)
BAD_ARRAYS = {
    "no inputs": (changed(inputs=None), "inputs: missing.*angle, labels"),
    "no labels": (changed(labels=None), "labels: missing"),
    "empty file": ({}, "inputs: missing.*nothing"),
    "objects": (changed(labels=np.array([{}] * 40)), "labels: Python objects"),
    "text labels": (changed(labels=np.array(["cat"] * 40)), "labels: type <U3; must be integers"),
    "float labels": (changed(labels=LABELS.astype(float)), "labels: type float64"),
    "bool labels": (changed(labels=LABELS > 1), "labels: type bool"),
    "one-hot labels": (changed(labels=np.eye(4, dtype=int)[LABELS]), r"labels: shape \(40, 4\); must be \(40,\)"),
    "fewer labels": (changed(labels=LABELS[:39]), r"labels: shape \(39,\); must be \(40,\)"),
    "negative label": (changed(labels=np.where(np.arange(40) == 5, -1, LABELS)), "labels: -1 at sample 5"),
    "labels from 1": (changed(labels=LABELS + 1), r"no sample of class 0; each class of 0\.\.4"),
    "a gap": (changed(labels=np.where(LABELS == 2, 3, LABELS)), "no sample of class 2"),
    "huge label": (changed(labels=np.where(LABELS == 2, 2**40, LABELS)), "labels: 1099511627776"),
    "one class": (changed(labels=LABELS * 0), "labels: only class 0; at least two"),
    "int inputs": (changed(inputs=INPUTS.astype(np.int64)), "inputs: type int64; allowed are uint8 and float32"),
    "double inputs": (changed(inputs=INPUTS.astype(np.float64)), "inputs: type float64"),
    "complex inputs": (changed(inputs=INPUTS.astype(complex)), "inputs: type complex128"),
    "scalar inputs": (changed(inputs=INPUTS[:, 0, 0, 0]), r"inputs: shape \(40,\)"),
    "no samples": (changed(inputs=INPUTS[:0], labels=LABELS[:0], angle=None), r"inputs: shape \(0, 6, 5, 3\)"),
    "no values": (changed(inputs=INPUTS[:, :0]), r"inputs: shape \(40, 0, 5, 3\)"),
    "many dimensions": (changed(inputs=INPUTS.reshape(40, 1, 1, 1, 1, 1, 6, 5, 3)), "9 dimensions; at most 8"),
    "NaN": (changed(inputs=np.where(np.arange(40)[:, None] == 3, np.nan, FLOATS[:, 0, 0]).astype("f4")), "sample 3"),
    "infinity": (changed(inputs=np.full_like(FLOATS, np.inf)), "inputs: NaN or infinity"),
    "too few": (changed(inputs=INPUTS[:9], labels=LABELS[:9], angle=None), "9 samples; at least 10"),
    "text factor": (changed(angle=np.array(["x"] * 40)), "angle: type <U1"),
    "short factor": (changed(angle=np.zeros(39)), r"angle: shape \(39,\)"),
    "deep factor": (changed(angle=np.zeros((40, 2, 2))), r"angle: shape \(40, 2, 2\)"),
    "NaN factor": (changed(angle=np.where(LABELS == 2, np.nan, 1.0)), "angle: NaN.*sample 2"),
    "large factor": (changed(angle=np.full(40, 1e300)), "angle: .*beyond float32"),
    "half a test split": (changed(test_inputs=INPUTS), "test_angle: missing"),
    "no test labels": (changed(test_inputs=INPUTS, test_angle=LABELS), "test_labels: missing"),
    "strange test key": (with_test(test_colour=LABELS), "test_colour: there is no colour"),
    "other test shape": (with_test(test_inputs=INPUTS[:4, :5]), r"test_inputs: samples \(5, 5, 3\) uint8; must be \(6"),
    "other test type": (with_test(test_inputs=FLOATS[:4]), "test_inputs: samples .* float32"),
    "unknown test class": (with_test(test_labels=LABELS[:4] + 2), r"test_labels: class 5; labels holds only 0\.\.3"),
    "other test factor": (with_test(test_angle=np.zeros((4, 2))), "test_angle: 2 values a sample; must have 1"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_malformed_arrays_are_refused(tmp_path, case):
    stored, message = BAD_ARRAYS[case]
    path = tmp_path / "bad.npz"
    np.savez(path, allow_pickle=True, **stored)
    with pytest.raises(UserError, match=message) as caught:
        load_split(arrays(path), "train")
    assert str(path) in str(caught.value)


def _npz_bytes(tmp_path):
    np.savez(tmp_path / "whole.npz", **good_arrays())
    return (tmp_path / "whole.npz").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable .npz"),
        (b"hello, I am a text file\n" * 20, "not a readable .npz"),
        (pickle.dumps({"inputs": [1]}), "not a readable .npz"),
        (b"\x93NUMPY\x01\x00", "not a readable .npz"),
        ("truncated", "not a readable .npz"),
        ("damaged", "damaged"),
        ("npy", "holds a single array"),
    ],
)
def test_foreign_and_damaged_files_are_refused(tmp_path, content, message):
    path = tmp_path / "bad.npz"
    if content == "truncated":
        content = _npz_bytes(tmp_path)[:-100]
    elif content == "damaged":
        whole = bytearray(_npz_bytes(tmp_path))
        whole[300:320] = bytes(20)
        content = bytes(whole)
    elif content == "npy":
        with path.open("wb") as file:
            np.save(file, INPUTS)
        content = path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_split(arrays(path), "train")
    assert str(path) in str(caught.value)


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"absent\.npz: does not exist"):
        load_split(arrays(tmp_path / "absent.npz"), "train")
    with pytest.raises(UserError, match="not a file"):
        load_split(arrays(tmp_path), "train")


# --- torchvision's sets, with small files of the same form


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A data root with CIFAR-10 of 20 + 4 images, and checksums that fit it."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(num, start):
        data = np.arange(num * 3072).reshape(num, 3072) % 251 + start
        return {"data": data.astype(np.uint8), "labels": [i % 10 for i in range(num)]}

    kind = torchvision_sets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [["data_batch_1", write("data_batch_1", batch(20, 0))]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", write("test_batch", batch(4, 2))]])
    names = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(kind, "meta", {"filename": "batches.meta", "key": "label_names", "md5": names})
    monkeypatch.setitem(torchvision_sets._NUM_SAMPLES, "cifar10", {"train": 20, "test": 4})
    return DataSection(name="cifar10", root=str(tmp_path))


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """A data root with MNIST of 30 + 5 images."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for stem, num in (("train", 30), ("t10k", 5)):
        pixels = (np.arange(num * 784) % 256).astype(np.uint8)
        header = np.array([0x803, num, 28, 28], ">i4").tobytes()
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = (np.arange(num) % 10).astype(np.uint8)
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(np.array([0x801, num], ">i4").tobytes() + labels.tobytes())
    for name in ("mnist", "translated_mnist"):
        monkeypatch.setitem(torchvision_sets._NUM_SAMPLES, name, {"train": 30, "test": 5})
    return DataSection(name="mnist", root=str(tmp_path))


def test_cifar_is_read_as_height_width_channels(cifar):
    split = load_split(cifar, "test")
    assert split.inputs.shape == (4, 32, 32, 3)
    assert split.inputs.flags.c_contiguous
    # The file holds 1024 red, 1024 green, 1024 blue values, row by row: pixel (y, x) of image 1 in channel c.
    for y, x, c in [(0, 0, 0), (5, 7, 1), (31, 31, 2)]:
        assert split.inputs[1, y, x, c] == (3072 + 1024 * c + 32 * y + x) % 251 + 2
    assert split.labels.tolist() == [0, 1, 2, 3]
    assert split.class_names == tuple("abcdefghij")


@pytest.mark.parametrize("name", ["mnist", "translated_mnist"])
def test_mnist_has_one_channel(mnist, name):
    split = load_split(mnist.model_copy(update={"name": name}), "train")
    assert split.inputs.shape == (30, 28, 28, 1)
    assert split.inputs[2, 3, 4, 0] == (2 * 784 + 3 * 28 + 4) % 256
    assert split.class_names == tuple("0123456789")


def test_missing_originals_say_what_was_looked_for_and_how_to_get_it(tmp_path):
    for name in ("cifar10", "cifar100", "mnist", "fashionmnist", "translated_mnist"):
        with pytest.raises(UserError, match=r"data\.root.*distmoe prepare CONFIG") as caught:
            load_split(DataSection(name=name, root=str(tmp_path / "none")), "train")
        assert str(tmp_path / "none") in str(caught.value)


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
def test_damaged_cifar_file_is_named(cifar, tmp_path, name):
    path = tmp_path / "cifar-10-batches-py" / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=f"{name} differs from its published checksum"):
        load_split(cifar, "train")


def _cut(content):
    return content[:-5]


def _empty(content):
    return b""


def _foreign(content):
    return b"GIF89a, a picture of a cat" * 10


def _fewer(content):
    return np.array([0x803, 2, 28, 28], ">i4").tobytes() + content[16 : 16 + 2 * 784]


@pytest.mark.parametrize("damage", [_cut, _empty, _foreign, _fewer])
def test_damaged_mnist_images_are_named(mnist, tmp_path, damage):
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.*(damaged|cannot be read).*delete it"):
        load_split(mnist, "train")


@pytest.mark.parametrize("damage", [_cut, _empty, _foreign, lambda content: content[:-1] + b"\x0b"])
def test_damaged_mnist_labels_are_named(mnist, tmp_path, damage):
    path = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte.*damaged.*delete it"):
        load_split(mnist, "train")


@pytest.mark.parametrize("error", [URLError("no route"), TimeoutError("timed out"), RuntimeError("wrong checksum")])
def test_failed_download_is_a_user_error(tmp_path, monkeypatch, error):
    def fail(self):
        assert socket.getdefaulttimeout() == 30
        raise error

    monkeypatch.setattr(torchvision_sets.CIFAR10, "download", fail)
    with pytest.raises(UserError, match=r"download into data\.root.*failed.*check the network.*by hand"):
        download(DataSection(name="cifar10", root=str(tmp_path)))
    assert socket.getdefaulttimeout() is None


def test_download_of_what_is_there_needs_no_network(cifar, mnist, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "create_connection", refuse)
    for data in (cifar, mnist, DataSection(name="synthetic")):
        download(data)


def test_unwritable_root_is_a_user_error(tmp_path):
    (tmp_path / "root").write_text("a file, not a folder")
    with pytest.raises(UserError, match=r"download into data\.root"):
        download(DataSection(name="mnist", root=str(tmp_path / "root")))


@pytest.mark.parametrize(
    ("name", "shape", "per_class", "first"),
    [
        ("cifar10", (50_000, 32, 32, 3), 5_000, "airplane"),
        ("cifar100", (50_000, 32, 32, 3), 500, "apple"),
        ("fashionmnist", (60_000, 28, 28, 1), 6_000, "T-shirt/top"),
    ],
)
def test_real_sets_are_balanced(data_root, name, shape, per_class, first):
    split = load_split(DataSection(name=name, root=str(data_root(name))), "train")
    assert split.inputs.shape == shape
    assert set(np.bincount(split.labels)) == {per_class}
    assert split.class_names[0] == first
