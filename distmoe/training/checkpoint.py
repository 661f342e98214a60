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
_REPLACED = ".replaced-"
_ALWAYS = {"weights.safetensors", "moments.safetensors", "buffers.safetensors", "state.json", "config.yaml"}


class DamagedCheckpointError(UserError):
    """A checkpoint is not whole: nothing of it can be trusted."""


@dataclass(frozen=True)
class Progress:
    """Position in the run: all that a resume needs besides the tensors.

    Attributes:
        step: Optimizer steps done.
        epoch: Epoch the next step belongs to.
        epoch_step: Steps of that epoch done.
        evaluated: Whether the evaluation that is due at this step, if any, is done.
    """

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    evaluated: bool = True


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
        times: Of the run so far, see :class:`distmoe.training.clock.Clock`.
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
    times: Mapping[str, float] = field(default_factory=dict)

    def inference_weights(self) -> dict[str, Tensor]:
        """What a trained model holds: averaged weights where there are any, and buffers."""
        weights = self.average or {name: state.weight for name, state in self.parameters.items()}
        return {**weights, **self.buffers}


@dataclass
class CheckpointFolder:
    """The checkpoints of one run.

    What is damaged is renamed to ``damaged-step-N`` when a run goes on from an older one: it is out of the way, and
    still there to be looked at.

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
            self._replace(target, temporary)
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

    def newest(self, set_aside: bool = False) -> TrainingState | None:
        """The newest whole checkpoint; None if there is none.

        Args:
            set_aside: Rename what is damaged, besides the warning, and put back what a crash left half-replaced.

        Raises:
            UserError: One cannot be read although it is not damaged (permissions, another format): going on from an
                older one would throw it away.
        """
        if set_aside:
            for kept in self.root.glob(f"{_REPLACED}step-*"):
                target = self.root / kept.name.removeprefix(_REPLACED)
                kept.rename(target) if not target.exists() else shutil.rmtree(kept)
        for step in reversed(self.steps()):
            try:
                return load_checkpoint(self.path(step))
            except DamagedCheckpointError as error:
                logger.warning("%s; trying the one before", error)
                if set_aside:
                    aside = self.root / f"damaged-step-{step}"
                    shutil.rmtree(aside, ignore_errors=True)
                    self.path(step).rename(aside)
        return None

    def _replace(self, target: Path, temporary: Path) -> None:
        """Puts ``temporary`` in the place of ``target``: a step saved again after its evaluation."""
        replaced = self.root / f"{_REPLACED}{target.name}"
        if target.exists():
            target.rename(replaced)
        try:
            temporary.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
        _flush(self.root)
        shutil.rmtree(replaced, ignore_errors=True)

    def _prune(self, saved: TrainingState) -> None:
        steps = self.steps()
        kept = set(steps[-self.keep :]) | ({saved.best.step} if saved.best else set())
        for step in steps:
            if step not in kept:
                shutil.rmtree(self.path(step), ignore_errors=True)


def load_checkpoint(folder: Path) -> TrainingState:
    """Reads and verifies one checkpoint folder.

    Raises:
        DamagedCheckpointError: It is missing or damaged; the message names the file.
        UserError: It may not be read, or is of another format.
    """
    try:
        checksums = json.loads((folder / "checksums.json").read_text())
        if unlisted := _ALWAYS - checksums.keys():
            raise DamagedCheckpointError(f"checkpoint {folder}: checksums.json lacks {min(unlisted)}; use another")
        for name, expected in checksums.items():
            if _checksum(folder / name) != expected:
                raise DamagedCheckpointError(f"checkpoint {folder}: {name} is damaged (checksum differs); use another")
        values = json.loads((folder / "state.json").read_text())
        if values["format"] != FORMAT:
            raise UserError(f"checkpoint {folder}: format {values['format']}, this version reads {FORMAT}")
        return _read(folder, values)
    except (FileNotFoundError, NotADirectoryError) as error:
        name = Path(error.filename or "").name or "it"
        raise DamagedCheckpointError(f"checkpoint {folder}: {name} is missing; use another") from None
    except OSError as error:
        raise UserError(f"checkpoint {folder}: cannot be read ({error}); mend that, or use another") from None
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise DamagedCheckpointError(f"checkpoint {folder}: cannot be read ({error}); use another") from None


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
        "times": dict(state.times),
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
        times=values["times"],
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
