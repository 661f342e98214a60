"""Checkpoints: everything a run needs to go on, in any layout, written whole or not at all.

A checkpoint is a folder ``step-N`` of safetensors and JSON files, so loading runs nobody's code: a file of tensors from
every rank (:mod:`distmoe.training.tensor_files`), ``index.json`` (which element of which tensor is where),
``state.json``, ``config.yaml`` and ``checksums.json``. Tensors have the names and shapes of the one-process model. All
ranks write at once into a temporary folder, which is flushed to disk and renamed; whatever is not whole is never taken
for a checkpoint.
"""

import dataclasses
import json
import logging
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from distmoe.contracts import DataSpec, UserError
from distmoe.data.disk import flush
from distmoe.parallel.control import Control
from distmoe.parallel.shards import AVERAGE, WEIGHT, Piece
from distmoe.training.integrity import DamagedCheckpointError, checksum_of, read_checksums, reading, unseen, verify
from distmoe.training.tensor_files import Index, ModelTensors, PieceFiles, as_rows, merge, piece_file, write_pieces

logger = logging.getLogger(__name__)

FORMAT = 2
_TEMPORARY = ".writing-"
_REPLACED = ".replaced-"
_REMOVED = ".removed-"
_ALWAYS = {"index.json", "state.json", "config.yaml"}


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
    """The content of a checkpoint besides its tensors.

    Attributes:
        progress: Position in the run.
        best: Best validation result, or None before the first.
        scaler: Loss scale of fp16, else empty.
        fingerprint: Of the data.
        spec: Of the data.
        config_yaml: The run's configuration.
        interval: Sums of the metrics line that is still to be written, if any.
        times: Of the run so far, see :class:`distmoe.training.clock.Clock`.
        layout: In which it was saved, see :attr:`distmoe.training.session.Session.layout`; any other can go on.
    """

    progress: Progress
    best: Best | None
    scaler: Mapping[str, float]
    fingerprint: str
    spec: DataSpec
    config_yaml: str
    interval: Mapping[str, float] = field(default_factory=dict)
    times: Mapping[str, float] = field(default_factory=dict)
    layout: Mapping[str, Any] = field(default_factory=dict)


Needed = Callable[[TrainingState], bool]
"""Whether the tensors of a checkpoint with this state are needed; the same on all ranks."""


def always(state: TrainingState) -> bool:
    """Says yes."""
    del state
    return True


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, opened; its tensors are read when somebody asks for them.

    Attributes:
        state: What it holds besides tensors.
        tensors: Weights, moments, buffers and averages.
    """

    state: TrainingState
    tensors: PieceFiles

    def trained(self) -> ModelTensors:
        """What a trained model holds: averaged weights where there are any, and buffers."""
        return ModelTensors(self.tensors, AVERAGE if self.tensors.names(AVERAGE) else WEIGHT)


@dataclass
class CheckpointFolder:
    """The checkpoints of one run, on storage that all its ranks share.

    What is damaged is renamed to ``damaged-step-N`` when a run goes on from an older one: it is out of the way, and
    still there to be looked at.

    Attributes:
        root: The folder that holds ``step-N`` folders; made on the first save.
        keep: How many of the newest stay, besides the best.
    """

    root: Path
    keep: int

    def save(self, state: TrainingState, pieces: Iterable[Piece], control: Control | None = None) -> Path:
        """Writes ``step-N`` and removes what is old. Collective.

        Args:
            state: That of rank 0 is written.
            pieces: What this rank writes; over all ranks every element of every tensor once.
            control: Of all ranks; None: there is one.

        Raises:
            UserError: A rank could not write (disk full, folder not writable or not shared); on all ranks, and the
                older checkpoints are untouched.
        """
        control = control or Control()
        target = self.path(state.progress.step)
        temporary = self.root / f"{_TEMPORARY}{target.name}"
        try:
            control.on_main(lambda: self._begin(target, temporary))
            control.together(lambda: _write_share(target, temporary, pieces, control))
            control.on_main(lambda: self._finish(target, temporary, state, control.world_size))
        except ValueError:
            if control.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return target

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is or would be."""
        return self.root / f"step-{step}"

    def steps(self) -> list[int]:
        """Steps with a checkpoint folder, whole or not, ascending."""
        names = [path.name.removeprefix("step-") for path in self.root.glob("step-*") if path.is_dir()]
        return sorted(int(name) for name in names if name.isdigit())

    def newest(
        self, set_aside: bool = False, control: Control | None = None, needed: Needed = always
    ) -> Checkpoint | None:
        """The newest whole checkpoint, the same on all ranks; None if there is none. Collective.

        Args:
            set_aside: Rename what is damaged, besides the warning, and put back what a crash left half-replaced.
            control: Of all ranks; None: there is one.
            needed: See :func:`load_checkpoint`.

        Raises:
            UserError: One cannot be read although it is not damaged (permissions, another format, storage that not all
                ranks share): going on from an older one would throw it away.
        """
        control = control or Control()
        for step in reversed(control.on_main(lambda: self._whole_or_not(set_aside))):
            try:
                return load_checkpoint(self.path(step), control, needed)
            except DamagedCheckpointError as error:
                if control.is_main:
                    logger.warning("%s; trying the one before", error)
                if set_aside:
                    control.on_main(partial(self._set_aside, step))
        return None

    def _begin(self, target: Path, temporary: Path) -> None:
        with _writing(target):
            self.root.mkdir(parents=True, exist_ok=True)
            for leftover in self.root.glob(f"{_REMOVED}*"):  # some reader may still have it open: it costs only space
                shutil.rmtree(leftover, ignore_errors=True)
            for leftover in self.root.glob(f"{_TEMPORARY}*"):
                shutil.rmtree(leftover)
            temporary.mkdir()

    def _finish(self, target: Path, temporary: Path, state: TrainingState, world_size: int) -> None:
        with _writing(target):
            _write_description(target, temporary, state, world_size)
            self._replace(target, temporary)
        self._prune(state)

    def _whole_or_not(self, set_aside: bool) -> list[int]:
        if set_aside:
            with _renaming(self.root):
                for kept in self.root.glob(f"{_REPLACED}step-*"):
                    target = self.root / kept.name.removeprefix(_REPLACED)
                    kept.rename(target) if not target.exists() else shutil.rmtree(kept)
        return self.steps()

    def _set_aside(self, step: int) -> None:
        aside = self.root / f"damaged-step-{step}"
        with _renaming(self.root):
            shutil.rmtree(aside, ignore_errors=True)
            self.path(step).rename(aside)

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
        flush(self.root)
        shutil.rmtree(replaced, ignore_errors=True)

    def _prune(self, saved: TrainingState) -> None:
        steps = self.steps()
        kept = set(steps[-self.keep :]) | ({saved.best.step} if saved.best else set())
        for step in steps:
            if step not in kept:
                # Renamed first: a crash leaves nothing half removed under a checkpoint's name.
                removed = self.root / f"{_REMOVED}step-{step}"
                with suppress(OSError):
                    self.path(step).rename(removed)
                shutil.rmtree(removed, ignore_errors=True)


def load_checkpoint(folder: Path, control: Control | None = None, needed: Needed = always) -> Checkpoint:
    """Opens and verifies one checkpoint folder; each rank verifies its share of the files of tensors. Collective.

    Args:
        folder: ``step-N``.
        control: Of all ranks; None: there is one.
        needed: Whether its tensors are; else their files are not verified.

    Raises:
        DamagedCheckpointError: It is missing or damaged; the message names the file. On all ranks alike, as the other.
        UserError: It may not be read, is of another format, or some rank does not see what rank 0 sees.
    """
    control = control or Control()
    state, index, checksums = control.on_main(lambda: _read_description(folder))
    if needed(state):
        files = sorted(checksums.keys() - _ALWAYS)[control.rank :: control.world_size]
        control.together(lambda: verify(folder, checksums, files, control.rank))
    return Checkpoint(state, PieceFiles(folder, index, control.rank))


def spec_to_json(spec: DataSpec) -> dict[str, Any]:
    """Plain values of a data description."""
    return dataclasses.asdict(spec)


def spec_from_json(values: Mapping[str, Any]) -> DataSpec:
    """The inverse of :func:`spec_to_json`; JSON's lists become tuples."""
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return DataSpec(**plain)


def _write_share(target: Path, temporary: Path, pieces: Iterable[Piece], control: Control) -> None:
    """This rank's pieces, and beside them what rank 0 has to know of them."""
    where = "" if control.world_size == 1 else f" by rank {control.rank} on host {platform.node()}"
    with _writing(target, where):
        if not temporary.is_dir():
            raise unseen(target, "the folder that rank 0 has made", control.rank)
        path = temporary / piece_file(control.rank, control.world_size)
        checksum, rows = write_pieces(path, pieces)
        note = {"host": platform.node(), "checksum": checksum, "rows": rows}
        path.with_suffix(".json").write_text(json.dumps(note))


def _write_description(target: Path, folder: Path, state: TrainingState, world_size: int) -> None:
    """Everything that is written once; rank 0, after all ranks have written their pieces."""
    rows, checksums = [], {}
    for rank in range(world_size):
        name = piece_file(rank, world_size)
        note_file = (folder / name).with_suffix(".json")
        if not note_file.exists():
            raise unseen(target, f"what rank {rank} has written", 0)
        note = json.loads(note_file.read_text())
        rows += note["rows"]
        checksums[name] = note["checksum"]
        note_file.unlink()
    values = {
        "format": FORMAT,
        "progress": dataclasses.asdict(state.progress),
        "best": dataclasses.asdict(state.best) if state.best else None,
        "scaler": dict(state.scaler),
        "fingerprint": state.fingerprint,
        "spec": spec_to_json(state.spec),
        "interval": dict(state.interval),
        "times": dict(state.times),
        "layout": dict(state.layout),
    }
    texts = {
        "index.json": json.dumps(as_rows(merge(rows))),
        "state.json": json.dumps(values, indent=1),
        "config.yaml": state.config_yaml,
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        checksums[name] = checksum_of(folder / name)
    (folder / "checksums.json").write_text(json.dumps(checksums, indent=1))
    for name in (*texts, "checksums.json"):
        flush(folder / name)
    flush(folder)


@contextmanager
def _writing(target: Path, where: str = "") -> Iterator[None]:
    """What the disk refuses becomes a message for the user."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"checkpoint {target}: cannot be written{where} ({error.strerror or error}); free space or make "
            f"{target.parent} writable, then go on with run.resume=true from the newest whole checkpoint"
        ) from None


@contextmanager
def _renaming(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"checkpoints in {root}: cannot be renamed ({error.strerror}); make it writable") from None


def _read_description(folder: Path) -> tuple[TrainingState, Index, dict[str, str]]:
    """Of a checkpoint whose small files are whole, and the others there: state, index and checksums; rank 0."""
    with reading(folder):
        checksums = read_checksums(folder)
        verify(folder, checksums, ["state.json"])
        values = json.loads((folder / "state.json").read_text())
        if values["format"] != FORMAT:
            raise UserError(
                f"checkpoint {folder}: format {values['format']}, this version reads {FORMAT}: go on with the version "
                "that wrote it, or export the run with that one and start a new run with model.init_from"
            )
        verify(folder, checksums, _ALWAYS)
        index = merge(json.loads((folder / "index.json").read_text()))
        needed = {segment.file for stored in index.values() for segment in stored.segments}
        if unlisted := needed - checksums.keys():
            raise DamagedCheckpointError(f"checkpoint {folder}: checksums.json lacks {min(unlisted)}; use another")
        for name in sorted(checksums):
            (folder / name).stat()
        return _state(values, (folder / "config.yaml").read_text()), index, checksums


def _state(values: Mapping[str, Any], config_yaml: str) -> TrainingState:
    return TrainingState(
        progress=Progress(**values["progress"]),
        best=Best(**values["best"]) if values["best"] else None,
        scaler=values["scaler"],
        fingerprint=values["fingerprint"],
        spec=spec_from_json(values["spec"]),
        config_yaml=config_yaml,
        interval=values["interval"],
        times=values["times"],
        layout=values.get("layout", {}),
    )
