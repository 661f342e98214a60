"""Tiny runs for end-to-end tests: a learnable set of 8x8 images, a network of 3,000 weights, and comparisons."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmoe.config import RunConfig, parse_config
from distmoe.config.io import merge_overrides, to_yaml
from distmoe.parallel.shards import Piece
from distmoe.training.checkpoint import Checkpoint, TrainingState, load_checkpoint
from distmoe.training.run_folder import RunFolder

NUM_CLASSES, NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 4, 200, 40, 60
STEPS_PER_EPOCH = 5  # (200 - 40) / 32
TIMES = {"images_per_second", "data_wait_share", "augment_share"}  # what differs between equal runs


def write_quadrants(path: Path) -> Path:
    """A set of 8x8 colour images: the class is the quadrant that is brighter than the noise."""
    generator = np.random.default_rng(0)
    arrays = {}
    for prefix, size in (("", NUM_TRAIN), ("test_", NUM_TEST)):
        labels = np.arange(size) % NUM_CLASSES
        images = generator.integers(0, 120, (size, 8, 8, 3), dtype=np.uint8)
        for row, label in enumerate(labels):
            down, across = 4 * (label // 2), 4 * (label % 2)
            images[row, down : down + 4, across : across + 4] += 70
        arrays |= {f"{prefix}inputs": images, f"{prefix}labels": labels}
    np.savez(path, **arrays)
    return path


def tiny_values(data: Path, runs: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Plain values of a run of 10 steps in 2 epochs that takes a fraction of a second."""
    values: dict[str, Any] = {
        "run": {"dir": str(runs), "name": "run", "keep_checkpoints": 100},
        "data": {
            "name": "arrays",
            "path": str(data),
            "root": str(data.parent),
            "loader": "resident",
            "batch_size": 32,
            "validation_size": NUM_VALIDATION,
            # Augmentation draws from (seed, epoch, sample): without it a wrong epoch after a resume would not show.
            "augment": {"crop_padding": 1},
        },
        "model": {"name": "convnet", "widths": [8, 8], "ffn_stages": [2], "ffn_hidden": 8},
        "moe": {"num_experts": 4, "gate": {"name": "topk", "k": 2}, "loss_weights": {"load_balance": 0.01}},
        "optim": {"name": "adamw", "lr": 0.01},
        "train": {"epochs": 2, "log_every_steps": 1, "num_threads": 1},
    }
    return {**values, **{name: {**values.get(name, {}), **section} for name, section in sections.items()}}


def tiny_config(data: Path, runs: Path, *overrides: str) -> RunConfig:
    """The run of :func:`tiny_values` with ``section.field=value`` overrides."""
    return parse_config(merge_overrides(tiny_values(data, runs), overrides), source="tiny run")


def write_tiny_config(data: Path, runs: Path, *overrides: str) -> Path:
    """The same as a YAML file beside the runs."""
    path = runs / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_yaml(merge_overrides(tiny_values(data, runs), overrides)))
    return path


def folder_of(config: RunConfig) -> RunFolder:
    return RunFolder.of(config)


def checkpoint_steps(folder: RunFolder) -> list[int]:
    return folder.checkpoints().steps()


def last_checkpoint(folder: RunFolder) -> Checkpoint:
    return load_checkpoint(folder.checkpoints().path(checkpoint_steps(folder)[-1]))


def last_state(folder: RunFolder) -> TrainingState:
    return last_checkpoint(folder).state


def all_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Weights, moments, buffers and averages by a name of their own: ``weight NAME``, ``moment:exp_avg NAME``, ..."""
    source, tensors = checkpoint.tensors, {}
    for kind in source.kinds():
        for name in source.names(kind):
            shape = source.shape(kind, name)
            tensors[f"{kind} {name}"] = source.read(kind, name, 0, shape.numel()).view(shape)
    return tensors


def pieces_of(tensors: dict[str, Tensor]) -> list[Piece]:
    """Whole tensors, named as by :func:`all_tensors`, to be saved."""
    return [Piece(*name.split(" "), value.shape, 0, value.reshape(-1)) for name, value in tensors.items()]


def assert_same_state(left: Checkpoint, right: Checkpoint) -> None:
    """Bitwise equal tensors, and the same position and best result."""
    one, other = left.state, right.state
    assert (one.progress, one.best, one.fingerprint) == (other.progress, other.best, other.fingerprint)
    ours, theirs = all_tensors(left), all_tensors(right)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def metrics_lines(folder: RunFolder) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times."""
    lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def steps_logged(folder: RunFolder) -> int:
    """The last step in metrics.jsonl, readable while a process writes it."""
    if not folder.metrics_file.exists():
        return 0
    return max((int(found) for found in re.findall(r'"step": (\d+),', folder.metrics_file.read_text())), default=0)


def assert_same_run(left: RunFolder, right: RunFolder) -> None:
    """The same final weights, moments, metrics lines and test result."""
    assert_same_state(last_checkpoint(left), last_checkpoint(right))
    assert metrics_lines(left) == metrics_lines(right)
    kept = ("test_accuracy", "best_validation_accuracy", "selected_step", "steps")
    ours, theirs = left.read_summary(), right.read_summary()
    assert ours is not None
    assert theirs is not None
    assert {key: ours[key] for key in kept} == {key: theirs[key] for key in kept}
