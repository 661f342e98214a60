"""Checkpoints: everything a run needs to go on, by canonical name, written whole or not at all.

A checkpoint is a folder ``step-N`` of safetensors and JSON files, so loading runs nobody's code:
``weights.safetensors`` (parameters, float32), ``buffers.safetensors``, ``moments.safetensors`` (keys ``moment:name``),
``average.safetensors`` (if weights are averaged), ``state.json``, ``config.yaml`` and ``checksums.json``. It is
written into a temporary folder, flushed to disk and renamed; whatever is not whole is never taken for a checkpoint.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distmoe.contracts import DataSpec, UserError
from distmoe.parallel.engines.protocol import ParameterState

logger = logging.getLogger(__name__)

FORMAT = 1
_TEMPORARY = ".writing-"
_ALWAYS = {"weights.safetensors", "moments.safetensors", "buffers.safetensors", "state.json", "config.yaml"}


@dataclass(frozen=True)
class Progress:
    """Position in the run: all that a resume needs besides the tensors.

    Attributes:
        step: Optimizer steps done.
        epoch: Epoch the next step belongs to.
        epoch_step: Steps of that epoch done; all of them while its evaluation is still to come.
    """

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0


@dataclass(frozen=True)
class Best:
    """The best validation result so far and the step it belongs to."""

    step: int
    accuracy: float


@dataclass(frozen=True)
class TrainingState:
    """The content of a checkpoint.

    Attributes:
        progress: Position in the run.
        parameters: Weights and moments by canonical name.
        buffers: Registered buffers by name.
        average: Averaged weights by parameter name, or None.
        best: Best validation result, or None before the first.
        scaler: Loss scale of fp16, else empty.
        fingerprint: Of the data.
        spec: Of the data.
        config_yaml: The run's configuration.
        interval: Sums of the metrics line that is still to be written, if any.
    """

    progress: Progress
    parameters: Mapping[str, ParameterState]
    buffers: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None
    best: Best | None
    scaler: Mapping[str, float]
    fingerprint: str
    spec: DataSpec
    config_yaml: str
    interval: Mapping[str, float] = field(default_factory=dict)

    def inference_weights(self) -> dict[str, Tensor]:
        """What a trained model holds: averaged weights where there are any, and buffers."""
        weights = self.average or {name: state.weight for name, state in self.parameters.items()}
        return {**weights, **self.buffers}


@dataclass
class CheckpointFolder:
    """The checkpoints of one run.

    Attributes:
        root: The folder that holds ``step-N`` folders; made on the first save.
        keep: How many of the newest stay, besides the best.
    """

    root: Path
    keep: int

    def save(self, state: TrainingState) -> Path:
        """Writes ``step-N`` and removes what is old.

        Raises:
            UserError: It could not be written (disk full, folder not writable); the older ones are untouched.
        """
        target = self.path(state.progress.step)
        temporary = self.root / f"{_TEMPORARY}{target.name}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            for leftover in self.root.glob(f"{_TEMPORARY}*"):
                shutil.rmtree(leftover)
            temporary.mkdir()
            _write(temporary, state)
            replaced = self.root / f"{_TEMPORARY}over-{target.name}"
            if target.exists():  # a step that is saved again after its evaluation, or a damaged one
                target.rename(replaced)
            temporary.rename(target)
            _flush(self.root)
            shutil.rmtree(replaced, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(
                f"checkpoint {target}: cannot be written ({reason}); free space or make {self.root} writable, then go "
                "on with run.resume=true from the newest whole checkpoint"
            ) from None
        self._prune(state)
        return target

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is or would be."""
        return self.root / f"step-{step}"

    def steps(self) -> list[int]:
        """Steps with a checkpoint folder, whole or not, ascending."""
        names = [path.name.removeprefix("step-") for path in self.root.glob("step-*") if path.is_dir()]
        return sorted(int(name) for name in names if name.isdigit())

    def newest(self) -> TrainingState | None:
        """The newest whole checkpoint; a damaged one is skipped with a warning; None if there is none."""
        for step in reversed(self.steps()):
            try:
                return load_checkpoint(self.path(step))
            except UserError as error:
                logger.warning("%s; trying the one before", error)
        return None

    def _prune(self, saved: TrainingState) -> None:
        # Later steps than this one are of a past that was given up, because they were damaged.
        steps = [step for step in self.steps() if step <= saved.progress.step]
        kept = set(steps[-self.keep :]) | ({saved.best.step} if saved.best else set())
        for step in self.steps():
            if step not in kept:
                shutil.rmtree(self.path(step), ignore_errors=True)


def load_checkpoint(folder: Path) -> TrainingState:
    """Reads and verifies one checkpoint folder.

    Raises:
        UserError: It is missing, damaged, or of another format; the message names the file.
    """
    try:
        checksums = json.loads((folder / "checksums.json").read_text())
        if unlisted := _ALWAYS - checksums.keys():
            raise UserError(f"checkpoint {folder}: checksums.json lacks {min(unlisted)}; use another checkpoint")
        for name, expected in checksums.items():
            if _checksum(folder / name) != expected:
                raise UserError(f"checkpoint {folder}: {name} is damaged (checksum differs); use another checkpoint")
        values = json.loads((folder / "state.json").read_text())
        if values["format"] != FORMAT:
            raise UserError(f"checkpoint {folder}: format {values['format']}, this version reads {FORMAT}")
        return _read(folder, values)
    except FileNotFoundError as error:
        raise UserError(
            f"checkpoint {folder}: {Path(error.filename or '').name or 'it'} is missing; use another"
        ) from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"checkpoint {folder}: cannot be read ({error}); use another checkpoint") from None


def spec_to_json(spec: DataSpec) -> dict[str, Any]:
    """Plain values of a data description."""
    return dataclasses.asdict(spec)


def spec_from_json(values: Mapping[str, Any]) -> DataSpec:
    """The inverse of :func:`spec_to_json`; JSON's lists become tuples."""
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return DataSpec(**plain)


def _write(folder: Path, state: TrainingState) -> None:
    tensors: dict[str, Mapping[str, Tensor]] = {
        "weights.safetensors": {name: one.weight for name, one in state.parameters.items()},
        "moments.safetensors": {
            f"{moment}:{name}": value for name, one in state.parameters.items() for moment, value in one.moments.items()
        },
        "buffers.safetensors": state.buffers,
    }
    if state.average is not None:
        tensors["average.safetensors"] = state.average
    for name, content in tensors.items():
        save_file({key: value.detach().cpu().contiguous() for key, value in content.items()}, folder / name)
    values = {
        "format": FORMAT,
        "progress": dataclasses.asdict(state.progress),
        "best": dataclasses.asdict(state.best) if state.best else None,
        "scaler": dict(state.scaler),
        "fingerprint": state.fingerprint,
        "spec": spec_to_json(state.spec),
        "interval": dict(state.interval),
    }
    (folder / "state.json").write_text(json.dumps(values, indent=1))
    (folder / "config.yaml").write_text(state.config_yaml)
    checksums = {path.name: _checksum(path) for path in sorted(folder.iterdir())}
    (folder / "checksums.json").write_text(json.dumps(checksums, indent=1))
    for path in folder.iterdir():
        _flush(path)
    _flush(folder)


def _read(folder: Path, values: dict[str, Any]) -> TrainingState:
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(folder / "moments.safetensors").items():
        moment, _, name = key.partition(":")
        moments.setdefault(name, {})[moment] = value
    weights = load_file(folder / "weights.safetensors")
    average = folder / "average.safetensors"
    return TrainingState(
        progress=Progress(**values["progress"]),
        parameters={name: ParameterState(weight, moments.get(name, {})) for name, weight in weights.items()},
        buffers=load_file(folder / "buffers.safetensors"),
        average=load_file(average) if average.exists() else None,
        best=Best(**values["best"]) if values["best"] else None,
        scaler=values["scaler"],
        fingerprint=values["fingerprint"],
        spec=spec_from_json(values["spec"]),
        config_yaml=(folder / "config.yaml").read_text(),
        interval=values["interval"],
    )


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """What is in the file or folder reaches the disk before anything after it does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
