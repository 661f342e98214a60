"""What users get wrong, beyond a single value: a table of command lines, each with what the message must say.

To add a row, add a line to one of the lists: a name, a function that prepares files in an empty folder and returns the
command line, and pieces of the message (the place, the value, the fix). See :func:`changed` for the common case.
"""

import errno
import hashlib
import io
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

CLASSES = 3
SAMPLES = 40  # 4 of them are held out as the test split, 6 for validation: 30 are trained on
STEPS = 3  # of the trained run: batches of 10 of 30 samples, once


def arrays(**changes: Any) -> dict[str, Any]:
    """Images for the model of :func:`base_config`, with some arrays replaced; None leaves one out."""
    inputs = np.random.default_rng(0).integers(0, 256, (SAMPLES, 8, 8, 3), dtype=np.uint8)
    stored = {"inputs": inputs, "labels": np.arange(SAMPLES) % CLASSES, **changes}
    return {name: values for name, values in stored.items() if values is not None}


def base_config(folder: Path, data: Path) -> dict[str, Any]:
    """A run that takes a third of a second."""
    return {
        "run": {"dir": str(folder / "runs"), "name": "a"},
        "data": {
            "name": "arrays",
            "path": str(data),
            "root": str(folder / "root"),
            "loader": "resident",
            "batch_size": 10,
            "validation_size": 6,
        },
        "model": {"name": "convnet", "widths": [4], "ffn_stages": [1], "ffn_hidden": 4},
        "moe": {"num_experts": 2, "gate": {"name": "topk", "k": 2}},
        "optim": {"name": "sgd", "lr": 0.01},
        "train": {"epochs": 1, "num_threads": 1, "checkpoint_every_steps": 2},
    }


@dataclass
class Place:
    """Where a row prepares its files.

    Attributes:
        folder: Empty at first; nothing outside of it is touched.
        data: A good file of arrays, not to be changed.
        trained: The folder of a finished run on it, not to be changed.
        patch: Undone after the row.
        file_size_limit: Bytes at which every write to a file fails while the command runs: a full disk.
    """

    folder: Path
    data: Path
    trained: Path
    patch: pytest.MonkeyPatch
    file_size_limit: int | None = field(default=None)

    def config(self, name: str = "a.yaml") -> str:
        """Writes a good configuration."""
        return self.file(name, yaml.safe_dump(base_config(self.folder, self.data)))

    def file(self, name: str, content: str | bytes) -> str:
        """Writes a file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def npz(self, **changes: Any) -> str:
        """Writes a file of arrays."""
        path = self.folder / "bad.npz"
        np.savez(path, allow_pickle=True, **arrays(**changes))
        return str(path)

    def run(self) -> Path:
        """A copy of the finished run, where :meth:`config` would write its own."""
        target = self.folder / "runs" / "a"
        shutil.copytree(self.trained, target)
        return target

    def train(self, *overrides: str) -> list[str]:
        """The command line of a training."""
        return ["train", self.config(), *overrides]

    def resume(self, *overrides: str) -> list[str]:
        """The command line that goes on with the copy of the finished run, for a second epoch."""
        return self.train("run.resume=true", "train.epochs=2", *overrides)


@contextmanager
def full_disk(limit: int | None) -> Iterator[None]:
    """Lets no file of this process grow beyond ``limit`` bytes: a real, partial, failing write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # Python ignores SIGXFSZ, so it is an OSError
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


Prepare = Callable[[Place], list[str]]


@dataclass(frozen=True)
class Row:
    """One thing a user gets wrong.

    Attributes:
        name: Of the test.
        prepare: Writes files and returns the command line.
        expected: Pieces of the message; ``{folder}`` is the row's folder.
        leaves: Patterns of what may be new in the folder afterwards: what was whole before the error.
    """

    name: str
    prepare: Prepare
    expected: tuple[str, ...]
    leaves: tuple[str, ...] = ()


def changed(name: str, overrides: str, *expected: str, command: str = "train") -> Row:
    """A row that only changes settings of a good configuration; ``;`` stands between overrides."""
    return Row(name, lambda place: [command, place.config(), *overrides.split(";")], expected)


def data_file(name: str, content: bytes | dict[str, Any], *expected: str) -> Row:
    """A row with a bad file of arrays: its bytes, or the arrays that replace good ones."""

    def prepare(place: Place) -> list[str]:
        path = place.npz(**content) if isinstance(content, dict) else place.file("bad.npz", content)
        return place.train(f"data.path={path}")

    return Row(name, prepare, ("data.path {folder}/bad.npz", *expected))


def config_file(name: str, content: str | bytes, *expected: str) -> Row:
    """A row with a file that is no configuration."""
    return Row(name, lambda place: ["train", place.file("bad.yaml", content)], ("{folder}/bad.yaml", *expected))


COMBINATIONS = [
    changed("k above the number of experts", "moe.gate.k=3", "moe.gate.k (3)", "at most moe.num_experts (2)"),
    changed("k=1 renormalised", "moe.gate.k=1", "moe.gate.renormalize must be false for moe.gate.k=1"),
    changed("accumulation", "train.accumulation=3", "data.batch_size (10) must be divisible by train.accumulation (3)"),
    changed("tutorial without moe", "model={name: tutorial};moe=null", "model.name tutorial needs a moe section"),
    changed(
        "tutorial with weights that do not sum to 1",
        "model={name: tutorial};moe.gate.renormalize=false",
        "model.name tutorial",
        "must sum to 1",
        "moe.gate.renormalize=true",
    ),
    changed("tutorial with slots", "model={name: tutorial};moe.gate={name: soft}", "moe.gate.name soft does not mix"),
    changed(
        "tutorial under capacity",
        "model={name: tutorial};moe.gate.capacity_factor=1.0",
        "every sample needs all its experts",
        "moe.gate.capacity_factor=null",
    ),
    changed(
        "tutorial with a shared expert",
        "model={name: tutorial};moe.shared_hidden=8",
        "no shared expert",
        "moe.shared_hidden=0",
    ),
    changed("objective of another model", "moe.objective=competitive", "moe.objective competitive", "tutorial"),
    changed("k of a dense gate in training", "moe.gate={name: dense, k: 1}", "moe.gate.k of a dense gate", "use topk"),
    changed(
        "k of an attentive gate in training", "moe.gate={name: attentive, k: 1}", "moe.gate.k of an attentive gate"
    ),
    changed("noisy k=1", "moe.gate={name: noisy_topk, k: 1}", "moe.gate.k must be 2 or more for noisy_topk"),
    changed("sigmoid k=1 renormalised", "moe.gate={name: sigmoid, k: 1}", "moe.gate.renormalize must be false"),
    changed(
        "experts that choose too much",
        "moe.gate={name: expert_choice, capacity_factor: 2.5}",
        "moe.gate.capacity_factor (2.5) must be at most moe.num_experts (2)",
    ),
    changed(
        "steps of no constraint",
        "moe.gate={name: dense, constraint_steps: 9}",
        "moe.gate.constraint_steps needs moe.gate.margin",
    ),
    changed(
        "a CNN on positions",
        "moe.gate.network={name: cnn}",
        "model.name convnet",
        "tokens of shape (channels, height, width), not [4]",
    ),
    changed(
        "a CNN gate on a small image",
        "model={name: tutorial, channels: [2]};moe.gate.network={name: cnn, channels: [1, 1, 1, 1]}",
        "model.name tutorial",
        "4 pools leave nothing of a 8x8 image",
    ),
    changed("init_mode without init_from", "model.init_mode=grow", "model.init_mode needs model.init_from"),
    changed(
        "frozen experts without a mixture", "model.freeze_experts=1;model.init_from=a;moe=null", "model.freeze_experts"
    ),
    changed(
        "frozen experts that were never trained", "model.freeze_experts=1", "model.freeze_experts needs model.init_from"
    ),
    changed(
        "more frozen experts than all",
        "model.freeze_experts=3;model.init_from=elsewhere",
        "model.freeze_experts",
        "(3)",
        "(2)",
    ),
    changed("the same gate at plan", "moe.gate.k=1", "moe.gate.renormalize must be false", command="plan"),
    changed("dense twin with moe", "model={name: tutorial_cnn}", "remove the moe section (moe=null)"),
    changed("best without validation", "data.validation_size=0", "train.select best", "train.select=last"),
    changed("validation takes all", "data.validation_size=36", "data.validation_size is 36", "36 samples", "0 to 35"),
    changed("batch above the set", "data.batch_size=31", "data.batch_size is 31", "30 samples", "drop_last=false"),
    changed("fp16 on a CPU", "train.precision=fp16", "train.precision (fp16) needs a CUDA device", "bf16 or fp32"),
    changed("experts over processes", "parallel.expert_parallel_size=2", "parallel.expert_parallel_size (2)", "(1)"),
    changed("nesterov alone", "optim.nesterov=true;optim.momentum=0.0", "optim.nesterov needs optim.momentum above 0"),
    changed("stage out of range", "model.ffn_stages=[2]", "model.ffn_stages [2]", "different stages of 1..1"),
    changed("stage twice", "model.ffn_stages=[1, 1]", "model.ffn_stages [1, 1]"),
    changed("small image, convnet", "model.widths=[4, 4, 4, 4]", "4 stages", "8x8", "fewer model.widths"),
    changed(
        "small image, tutorial",
        "model={name: tutorial_cnn, channels: [1, 1, 1, 1]};moe=null",
        "model.name tutorial_cnn",
        "4 pools",
        "8x8",
    ),
    changed("arrays without a path", "data.path=null", "data.path must name the .npz file"),
    changed("a path for another set", "data.name=synthetic", "data.path is only read by data.name=arrays", "remove it"),
    changed("crop larger than the image", "data.augment.crop_padding=8", "data.augment.crop_padding (8)", "below 8"),
    changed("cutout larger than the image", "data.augment.cutout=9", "data.augment.cutout (9)", "at most 8"),
    changed("group beside image and batch", "moe.gate.group=epoch", "moe.gate.group ('epoch')", "'image' or 'batch'"),
    changed("two mistakes at once", "seed=x;train.epochs=0", "2 problems", "seed ('x')", "train.epochs (0)"),
    changed("the same at plan", "moe.gate.k=3", "moe.gate.k (3)", command="plan"),
    changed("the same at prepare", "moe.gate.k=3", "moe.gate.k (3)", command="prepare"),
    changed("no override", "optim.lr", "override 'optim.lr': must look like section.field=value"),
    changed("more threads than can start", "train.num_threads=1000000000", "train.num_threads (1000000000)", "1024"),
    changed(
        "a model beyond the memory",
        "model.ffn_hidden=2147483647;moe.num_experts=100000",
        "not enough memory",
        "num_experts",
    ),
    changed("NUL in a path", r'data.root="a\0b"', r"data.root ('a\x00b')"),
    changed("a run folder's name too long", f"run.dir={'x' * 300}", "run folder xxx", "File name too long", "run.dir"),
    changed("a data file's name too long", f"data.path={'x' * 300}", "data.path xxx", ".npz"),
    changed(
        "a data folder's name too long", f"data.path=null;data.name=mnist;data.root={'x' * 300}", "xxx", "not found"
    ),
]


def vectors(place: Place) -> list[str]:
    inputs = np.zeros((SAMPLES, 7), np.float32)
    return place.train(f"data.path={place.npz(inputs=inputs)}")


def augmented_vectors(place: Place) -> list[str]:
    return [*vectors(place), "data.augment.flip=random"]


def with_environment(name: str, value: str) -> Prepare:
    def prepare(place: Place) -> list[str]:
        place.patch.setenv(name, value)
        return place.train()

    return prepare


SURROUNDINGS = [
    Row("vectors for an image model", vectors, ("model.name convnet needs images", "[7]")),
    Row("augmented vectors", augmented_vectors, ("needs images", "[7]")),
    Row("WORLD_SIZE=2", with_environment("WORLD_SIZE", "2"), ("variable RANK is missing", "torchrun", "unset RANK")),
    Row("WORLD_SIZE=0", with_environment("WORLD_SIZE", "0"), ("WORLD_SIZE (0)",)),
    Row("WORLD_SIZE=two", with_environment("WORLD_SIZE", "two"), ("WORLD_SIZE ('two')", "whole number", "unset it")),
    Row("WORLD_SIZE=-1", with_environment("WORLD_SIZE", "-1"), ("WORLD_SIZE ('-1')",)),
    Row("WORLD_SIZE empty", with_environment("WORLD_SIZE", ""), ("WORLD_SIZE ('')",)),
    Row("WORLD_SIZE a superscript", with_environment("WORLD_SIZE", "²"), ("WORLD_SIZE ('²')",)),
    Row(
        "a strange restart count",
        with_environment("TORCHELASTIC_RESTART_COUNT", "x"),
        ("TORCHELASTIC_RESTART_COUNT ('x')", "whole number"),
    ),
]

CONFIG_FILES = [
    Row("no file", lambda place: ["train", str(place.folder / "no.yaml")], ("{folder}/no.yaml", "No such file")),
    Row("a folder", lambda place: ["train", str(place.folder)], ("config {folder}: cannot be read (Is a directory)",)),
    Row("a file below a file", lambda place: ["plan", place.config() + "/x"], ("Not a directory", "path of a YAML")),
    Row("a name too long", lambda place: ["plan", "x" * 300], ("config xxx", "File name too long")),
    config_file("binary", b"\x80\x04\x95\xff", "not UTF-8 text", "path of a YAML file"),
    config_file("not YAML", "data: [1, 2", "not valid YAML at line 1, column 12"),
    config_file("a tab", "data:\n\tname: mnist", "not valid YAML at line 2, column 1"),
    config_file("a list", "- data", "must hold sections (section: ...), not a list"),
    config_file("a sentence", "train my model", "not a str"),
    config_file("an empty section", "data:\n", "data (None): must be a section with fields: name, root"),
    config_file("a key twice", "seed: 1\nseed: 2", "line 2", "'seed' is given twice"),
    config_file("too large", "#" * 1_000_001, "larger than 1000000 bytes"),
    config_file("a Python object", "seed: !!python/object/apply:os.getpid []", "not valid YAML", "tag"),
    config_file("another program's", "services: {web: {image: x}}", "services: unknown key", "known keys here: seed"),
]


def zip_bytes(**changes: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=True, **arrays(**changes))
    return buffer.getvalue()


LABELS = arrays()["labels"]
FLOATS = arrays()["inputs"].astype(np.float32)

ARRAYS = [
    changed("arrays: no file", "data.path=no.npz", "data.path no.npz: does not exist", "must name a .npz file"),
    Row(
        "arrays: a folder",
        lambda place: place.train(f"data.path={place.folder}"),
        ("data.path {folder}: not a file", "must name a .npz file"),
    ),
    data_file("arrays: empty", b"", "not a readable .npz file"),
    data_file("arrays: text", b"x,y\n1,2\n" * 9, "not a readable .npz file"),
    data_file("arrays: cut in half", zip_bytes()[:4000], "not a readable .npz file"),
    data_file("arrays: cut at the end", zip_bytes()[:-9], "not a readable .npz file"),
    data_file("arrays: a byte changed", zip_bytes()[:900] + b"\xff\x00" + zip_bytes()[902:], "damaged"),
    data_file("arrays: objects", {"labels": np.array([{}] * SAMPLES)}, "labels: Python objects"),
    data_file("arrays: no labels", {"labels": None}, "labels: missing (the file holds: inputs)"),
    data_file("arrays: nothing", {"labels": None, "inputs": None}, "inputs: missing (the file holds: nothing)"),
    data_file("arrays: lengths differ", {"labels": LABELS[:9]}, "labels: shape (9,); must be (40,)"),
    data_file("arrays: NaN", {"inputs": np.full_like(FLOATS, np.nan)}, "inputs: NaN or infinity in sample 0"),
    data_file("arrays: negative labels", {"labels": LABELS - 1}, "labels: -1 at sample 0", "count from 0"),
    data_file("arrays: float labels", {"labels": LABELS / 2}, "labels: type float64; must be integers"),
    data_file("arrays: one class", {"labels": LABELS * 0}, "labels: only class 0", "at least two classes"),
    data_file("arrays: 64-bit images", {"inputs": FLOATS.astype(float)}, "inputs: type float64", "uint8 and float32"),
]


def of_set(name: str, *overrides: str, command: str = "train") -> Prepare:
    return lambda place: [command, place.config(), "data.path=null", f"data.name={name}", *overrides]


CIFAR_FILES = ["batches.meta", "test_batch", *(f"data_batch_{number}" for number in range(1, 6))]
MNIST_FILES = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def originals(name: str, folder: str, files: list[str], content: bytes) -> Prepare:
    def prepare(place: Place) -> list[str]:
        for file in files:
            place.file(f"root/{folder}/{file}", content)
        return of_set(name)(place)

    return prepare


def in_the_way(*overrides: str, command: str = "train") -> Prepare:
    """A file where the overrides, with ``{file}`` in them, need a folder."""
    return lambda place: [command, place.config(), *(one.format(file=place.file("file", "x")) for one in overrides)]


def without_ffcv(place: Place) -> list[str]:
    place.patch.setitem(sys.modules, "ffcv", None)
    for module in [name for name in sys.modules if name.startswith("ffcv.")]:
        place.patch.setitem(sys.modules, module, None)
    for module in ("distmoe.data.ffcv_package", "distmoe.data.beton_writer", "distmoe.data.loaders.ffcv"):
        place.patch.delitem(sys.modules, module, raising=False)
        package, _, name = module.rpartition(".")
        if package in sys.modules:
            place.patch.delattr(sys.modules[package], name, raising=False)
    return place.train("data.loader=ffcv")


def without_ffcv_prepare(place: Place) -> list[str]:
    return ["prepare", *without_ffcv(place)[1:]]


def on_full_disk(limit: int, arguments: Prepare) -> Prepare:
    def prepare(place: Place) -> list[str]:
        place.file_size_limit = limit
        return arguments(place)

    return prepare


def full_at_the_sidecar(place: Place) -> list[str]:
    replace = os.replace

    def refuse(source: Any, target: Any, **options: Any) -> None:
        if str(target).endswith(".json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target, **options)

    place.patch.setattr(os, "replace", refuse)
    return ["prepare", *place.train(FFCV)[1:]]


FFCV = "data.loader=ffcv"
DATA_SETS = [
    Row("cifar10: not there", of_set("cifar10"), ("data.name=cifar10", "{folder}/root/cifar-10", "distmoe prepare")),
    Row("mnist: not there", of_set("mnist", FFCV), ("data.name=mnist", "{folder}/root/MNIST"), leaves=("root*",)),
    Row(
        "cifar10: empty files",
        originals("cifar10", "cifar-10-batches-py", CIFAR_FILES, b""),
        ("{folder}/root/cifar-10-batches-py/", "checksum", "delete it", "distmoe prepare"),
    ),
    Row(
        "cifar10: foreign files",
        originals("cifar10", "cifar-10-batches-py", CIFAR_FILES, b"<html>404</html>"),
        ("{folder}/root/cifar-10-batches-py/", "checksum", "delete it"),
    ),
    Row(
        "mnist: empty files",
        originals("mnist", "MNIST/raw", MNIST_FILES, b""),
        ("{folder}/root/MNIST/raw/train", "damaged", "delete it"),
    ),
    Row(
        "mnist: cut short",
        originals("mnist", "MNIST/raw", MNIST_FILES, b"\x00\x00\x08\x03\x00\x00\xea\x60\x00\x00\x00\x1c\x00\x00"),
        ("{folder}/root/MNIST/raw/train", "damaged", "delete it"),
    ),
    Row(
        "a root that cannot be made",
        in_the_way("data.path=null", "data.name=cifar10", "data.root={file}/x", command="prepare"),
        ("data.root {folder}/file/x", "Not a directory"),
    ),
    Row(
        "prepared_dir is a file",
        in_the_way(FFCV, "data.prepared_dir={file}"),
        ("{folder}/file", "data.prepared_dir", "File exists"),
    ),
    Row(
        "prepared_dir below a file",
        in_the_way(FFCV, "data.prepared_dir={file}/x", command="prepare"),
        ("{folder}/file/x", "data.prepared_dir", "Not a directory"),
    ),
    Row(
        "prepared_dir not writable",
        lambda place: place.train(FFCV, "data.prepared_dir=/proc/distmoe"),
        ("/proc/distmoe", "data.prepared_dir"),
    ),
    Row("ffcv is missing", without_ffcv, ("data.loader", "ffcv", "bash launch/setup.sh", "data.loader=resident")),
    Row(
        "ffcv is missing at prepare",
        without_ffcv_prepare,
        ("data.loader", "ffcv", "bash launch/setup.sh", "data.loader=resident"),
        leaves=("root", "root/*.lock"),
    ),
    Row(
        "full disk: prepared file",
        on_full_disk(5000, lambda place: ["prepare", *place.train(FFCV)[1:]]),
        ("{folder}/root", "data.prepared_dir", "free some space"),
        leaves=("root", "root/*.lock"),
    ),
    Row(
        "full disk: prepared file's side-car",
        full_at_the_sidecar,
        ("{folder}/root (No space left on device", "data.prepared_dir", "free some space"),
        leaves=("root", "root/*.lock", "root/*.beton"),
    ),
]


def used_folder(place: Place) -> list[str]:
    place.file("runs/a/notes.txt", "mine")
    return place.train()


def finished_again(place: Place) -> list[str]:
    place.run()
    return place.train()


def run_is_a_file(place: Place) -> list[str]:
    place.file("runs/a", "x")
    return place.train()


def edited(state: Path, **changes: Any) -> None:
    """Changes values in a checkpoint's state.json such that the checksums are right again."""
    values = {**json.loads((state / "state.json").read_text()), **changes}
    (state / "state.json").write_text(json.dumps(values))
    checksums = json.loads((state / "checksums.json").read_text())
    checksums["state.json"] = hashlib.sha256((state / "state.json").read_bytes()).hexdigest()
    (state / "checksums.json").write_text(json.dumps(checksums))


def resumed(prepare: Callable[[Path], object], *overrides: str) -> Prepare:
    """Goes on with the finished run after something was done to its folder."""

    def arguments(place: Place) -> list[str]:
        prepare(place.run())
        return place.resume(*overrides)

    return arguments


def other_data(place: Place) -> list[str]:
    place.run()
    return place.resume(f"data.path={place.npz(labels=LABELS[::-1])}")


def as_file(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    path.write_text("x")


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def on_run(command: str, prepare: Callable[[Path], object], *arguments: str) -> Prepare:
    """A command on a copy of the finished run after something was done to it."""

    def command_line(place: Place) -> list[str]:
        prepare(place.run())
        return [command, str(place.folder / "runs" / "a"), *(one.format(folder=place.folder) for one in arguments)]

    return command_line


def nothing(run: Path) -> None:
    """The run stays as it is."""


def no_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def all_damaged(run: Path) -> None:
    for weights in run.glob("checkpoints/*/tensors-*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1])


def long_metrics(run: Path) -> None:
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write((json.dumps({"step": 2, "loss": 1.0}) + "\n") * 200)


def best_gone(run: Path) -> None:
    edited(run / f"checkpoints/step-{STEPS}", best={"step": 1, "accuracy": 1.0})


def best_damaged(run: Path) -> None:
    edited(run / f"checkpoints/step-{STEPS}", best={"step": 2, "accuracy": 1.0})
    (run / "checkpoints/step-2/tensors-00001-of-00001.safetensors").write_bytes(b"")


def without_tensorboard(place: Place) -> list[str]:
    """Its files would be the first to be too large."""
    place.patch.setattr("distmoe.training.tensorboard.SummaryWriter", MagicMock())
    return place.train("train.log_every_steps=1", "train.epochs=25", "moe=null")


# What training writes before the first checkpoint, whole: nothing of it is a temporary file.
STARTED = ("runs", "runs/a", "runs/a/config.yaml", "runs/a/metrics.jsonl", "runs/a/tensorboard*", "runs/a/checkpoints")
WHOLE = (*STARTED, "runs/a/checkpoints/step-*")

RUNS = [
    Row("a used run folder", used_folder, ("run folder {folder}/runs/a is not empty", "run.resume=true", "run.name")),
    Row("a finished run again", finished_again, ("runs/a is not empty",)),
    Row("the run folder is a file", run_is_a_file, ("run folder {folder}/runs/a", "is a file", "run.dir")),
    Row("run.dir is a file", in_the_way("run.dir={file}"), ("{folder}/file is a file", "another run.dir")),
    Row("run.dir not writable", lambda place: place.train("run.dir=/proc/distmoe"), ("/proc/distmoe", "run.dir")),
    Row(
        "resume beyond the end",
        resumed(nothing, "train.max_steps=2"),
        (f"checkpoint of step {STEPS}", "beyond this run's 2 steps", "train.max_steps"),
    ),
    Row("resume with other data", other_data, (f"step {STEPS} was trained on other data", "restore the data")),
    Row(
        "resume with another model",
        resumed(nothing, "model.widths=[8]"),
        (f"checkpoint of step {STEPS}", "do not fit model.name", "has shape"),
    ),
    Row(
        "resume with another optimizer",
        resumed(nothing, "optim={name: adamw}"),
        (f"checkpoint of step {STEPS}", "optim.name (adamw)", "sgd"),
    ),
    Row(
        "resume inside of an epoch that is shorter now",
        resumed(lambda run: shutil.rmtree(run / f"checkpoints/step-{STEPS}"), "data.batch_size=30", "train.epochs=9"),
        ("checkpoint of step 2", "data.batch_size", "2 steps", "1"),
    ),
    Row(
        "resume with a damaged config.yaml",
        resumed(lambda run: (run / "config.yaml").write_text("{")),
        ("{folder}/runs/a/config.yaml", "not valid YAML"),
    ),
    Row(
        "resume where metrics.jsonl is a folder",
        resumed(lambda run: as_folder(run / "metrics.jsonl")),
        ("{folder}/runs/a/metrics.jsonl", "Is a directory"),
        leaves=("runs/a/config.yaml",),
    ),
    Row(
        "resume where tensorboard is a file",
        resumed(lambda run: as_file(run / "tensorboard")),
        ("{folder}/runs/a/tensorboard", "cannot be written"),
        leaves=("runs/a/*",),
    ),
    Row(
        "resume where checkpoints is a file",
        resumed(lambda run: as_file(run / "checkpoints")),
        ("{folder}/runs/a/checkpoints", "cannot be written", "run.resume=true"),
        leaves=("runs/a/*",),
    ),
    Row(
        "diverging",
        lambda place: place.train("optim.lr=1e18"),
        ("training diverged", "step 2", "Lower optim.lr", "no checkpoint"),
        leaves=STARTED,
    ),
    Row("evaluate: no folder", lambda place: ["evaluate", "no"], ("run no: no config.yaml there", "folder of a run")),
    Row("evaluate: a config", lambda place: ["evaluate", place.config()], ("a.yaml: no config.yaml there",)),
    Row("evaluate: no checkpoint", on_run("evaluate", no_checkpoints), ("no whole checkpoint", "train it first")),
    Row("evaluate: all damaged", on_run("evaluate", all_damaged), ("no whole checkpoint in it",)),
    Row("evaluate: best gone", on_run("evaluate", best_gone), ("checkpoints/step-1", "is missing")),
    Row(
        "evaluate: best damaged",
        on_run("evaluate", best_damaged),
        ("checkpoints/step-2", "tensors-00001-of-00001.safetensors is damaged (checksum differs)"),
    ),
    Row(
        "evaluate: more experts",
        on_run("evaluate", nothing, "moe.num_experts=3"),
        ("do not fit", "has shape", "[3, 4]", "[2, 4]"),
    ),
    Row("evaluate: a wrong override", on_run("evaluate", nothing, "moe.gate.k=9"), ("moe.gate.k (9)",)),
    Row("evaluate: data gone", on_run("evaluate", nothing, "data.path={folder}/no"), ("data.path", "does not exist")),
    Row("export: wrong name", on_run("export", nothing, "{folder}/m.pt"), ("m.pt", "must end in .safetensors")),
    Row(
        "export: not writable",
        on_run("export", nothing, "{folder}/runs/a/config.yaml/m.safetensors"),
        ("config.yaml/m.safetensors", "cannot be written"),
    ),
    Row("export: no run", lambda place: ["export", "no", "m.safetensors"], ("run no: no config.yaml there",)),
    Row(
        "full disk: config.yaml",
        on_full_disk(100, lambda place: place.train()),
        ("run folder {folder}/runs/a: cannot be written (File too large)",),
        leaves=("runs", "runs/a"),
    ),
    Row(
        "full disk: metrics",
        on_full_disk(9000, without_tensorboard),
        ("{folder}/runs/a/metrics.jsonl: cannot be written (File too large)", "free space"),
        leaves=WHOLE,
    ),
    Row(
        "full disk: TensorBoard",
        on_full_disk(9000, lambda place: place.train()),
        ("{folder}/runs/a/tensorboard: cannot be written (File too large)", "free space"),
        leaves=WHOLE,
    ),
    Row(
        "full disk: checkpoint",
        on_full_disk(6000, lambda place: place.train("model.ffn_hidden=256")),
        ("{folder}/runs/a/checkpoints/step-2: cannot be written", "run.resume=true"),
        leaves=STARTED,
    ),
    Row(
        "full disk: evaluation",
        on_full_disk(50, on_run("evaluate", nothing)),
        ("{folder}/runs/a/evaluation.json: cannot be written (File too large)", "free space"),
    ),
    Row(
        "full disk: export",
        on_full_disk(500, on_run("export", nothing, "{folder}/m.safetensors")),
        ("{folder}/m.safetensors: cannot be written",),
    ),
    Row(
        "full disk: profile",
        on_full_disk(40_000, lambda place: place.train("train.profile_steps=1", "train.epochs=4")),
        ("{folder}/runs/a/profile", "cannot be written", "free space"),
        leaves=WHOLE,
    ),
    Row(
        "full disk: metrics of a resumed run",
        on_full_disk(2500, resumed(long_metrics)),
        ("{folder}/runs/a/metrics.jsonl: cannot be written (File too large)",),
        leaves=("runs/a/config.yaml",),
    ),
    Row(
        "full disk: report",
        on_full_disk(500, on_run("report", nothing, "--out", "{folder}/report")),
        ("report {folder}/report:", "File too large", "--out"),
        leaves=("report",),
    ),
    Row(
        "a finished run with a damaged summary",
        lambda place: resumed(lambda run: (run / "summary.json").write_text("[]"))(place)[:3],
        ("{folder}/runs/a/summary.json: cannot be read", "remove it"),
    ),
    Row("report: no run", lambda place: ["report", str(place.folder)], ("run {folder}: no config.yaml there",)),
    Row(
        "report: not writable",
        on_run("report", nothing, "--out", "{folder}/runs/a/config.yaml/x"),
        ("{folder}/runs/a/config.yaml", "Not a directory", "--out"),
    ),
    Row(
        "report: a foreign evaluation",
        on_run("report", lambda run: (run / "evaluation.json").write_text('{"class_accuracy": {}, "layers": []}')),
        ("{folder}/runs/a/evaluation.json: not a whole evaluation", "distmoe evaluate"),
        leaves=("report", "report/learning_curves.png"),
    ),
]


def from_weights(content: str | dict[str, str] | None) -> Prepare:
    """Starts from a file with this text, or from a whole safetensors file with this metadata."""

    def prepare(place: Place) -> list[str]:
        path = place.folder / "m.safetensors"
        if isinstance(content, str):
            path.write_text(content)
        else:
            save_file({"weight": torch.zeros(2)}, path, content)
        return place.train(f"model.init_from={path}")

    return prepare


def from_run(prepare: Callable[[Path], object], *overrides: str) -> Prepare:
    def arguments(place: Place) -> list[str]:
        prepare(place.run())
        return place.train(f"model.init_from={place.folder / 'runs/a'}", "run.name=b", *overrides)

    return arguments


WEIGHTS = [
    changed("init_from: nothing there", "model.init_from=gone", "model gone: no such folder or file", "run's folder"),
    Row("init_from: no run", lambda place: place.train(f"model.init_from={place.folder}"), ("no config.yaml there",)),
    Row("init_from: untrained", from_run(no_checkpoints), ("no whole checkpoint",)),
    Row(
        "init_from: another model",
        from_run(nothing, "model.widths=[5]"),
        ("model.init_from {folder}/runs/a", "do not fit", "has shape"),
    ),
    Row("init_from: text", from_weights("hello"), ("m.safetensors: not a whole file", "distmoe export")),
    Row("init_from: empty", from_weights(""), ("m.safetensors: not a whole file",)),
    Row("init_from: foreign", from_weights(None), ("m.safetensors: not a whole file", "distmoe export")),
    Row(
        "init_from: foreign metadata",
        from_weights({"config": "- a", "spec": "{}"}),
        ("m.safetensors: not a whole file", "distmoe export"),
    ),
    Row(
        "init_from: metadata without sense",
        from_weights({"config": "seed: x", "spec": "[1]"}),
        ("m.safetensors", "distmoe export"),
    ),
]


def bench(*options: str) -> Prepare:
    return lambda place: ["bench", "loader", place.config(), *options]


# Typer's own messages, in its own words; the exit code is the same.
COMMAND_LINE = [
    Row("an unknown command", lambda place: ["trian", place.config()], ("No such command 'trian'",)),
    Row("an unknown option", lambda place: ["train", place.config(), "--fast"], ("No such option", "--fast")),
    Row("no configuration", lambda place: ["train"], ("Missing argument",)),
    Row(
        "too few rounds",
        lambda place: ["bench", "loader", place.config(), "--rounds", "1"],
        ("'--rounds'", "greater than or equal to"),
    ),
    Row(
        "rounds as text",
        lambda place: ["bench", "loader", place.config(), "--rounds", "x"],
        ("'--rounds'", "valid integer"),
    ),
]

TABLE = [*COMBINATIONS, *SURROUNDINGS, *CONFIG_FILES, *ARRAYS, *DATA_SETS, *RUNS, *WEIGHTS]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder but locks: the content of files, None for folders."""
    found: dict[str, bytes | None] = {}
    for root, folders, files in os.walk(folder):
        inside = Path(root).relative_to(folder)
        found |= {str(inside / name): None for name in folders}
        found |= {str(inside / name): (Path(root) / name).read_bytes() for name in files if name != ".lock"}
    return found
