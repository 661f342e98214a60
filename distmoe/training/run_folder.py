"""The folder of a run: what is in it, when it may be used, and how things are read back from it."""

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distmoe.config import RunConfig, config_to_yaml, load_config
from distmoe.contracts import UserError
from distmoe.data.file_lock import file_lock
from distmoe.parallel.control import Control
from distmoe.training.checkpoint import Checkpoint, CheckpointFolder, TrainingState, load_checkpoint
from distmoe.training.integrity import DamagedCheckpointError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """``run.dir/run.name/``: config.yaml, metrics.jsonl, checkpoints/, tensorboard/, profile/, summary.json."""

    path: Path

    @staticmethod
    def of(config: RunConfig) -> "RunFolder":
        """The folder a configuration writes to."""
        return RunFolder(Path(config.run.dir) / (config.run.name or "run"))

    @staticmethod
    def existing(path: str | Path) -> "RunFolder":
        """A folder that a run has been trained in.

        Raises:
            UserError: It is not one.
        """
        folder = RunFolder(Path(path))
        if not folder.config_file.is_file():
            raise UserError(
                f"run {path}: no config.yaml there; give the folder of a run, run.dir/run.name of its config"
            )
        return folder

    @property
    def config_file(self) -> Path:
        """The merged configuration."""
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        """One JSON line a log interval or evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def summary_file(self) -> Path:
        """The results, written last."""
        return self.path / "summary.json"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    def checkpoints(self, keep: int = 1) -> CheckpointFolder:
        """The checkpoints; ``keep`` matters when one is saved."""
        return CheckpointFolder(self.path / "checkpoints", keep)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """One process at a time trains in the folder; the lock ends with the process.

        Raises:
            UserError: Another process does, or the folder cannot be written.
        """
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        lock = contextlib.ExitStack()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            held = lock.enter_context(file_lock(self.path / ".lock", "the run", wait=False))
        except OSError as error:
            raise UserError(
                f"run folder {self.path}: cannot be written ({error.strerror}); "
                "make it writable or choose another run.dir"
            ) from None
        with lock:
            if not held:
                raise UserError(
                    f"run folder {self.path}: another process trains in it; wait for it or choose another run.name"
                )
            try:
                yield
            except BaseException:
                if made and not self.config_file.exists():  # nothing was trained: leave nothing behind
                    with contextlib.suppress(OSError):
                        (self.path / ".lock").unlink()
                        for folder in made:
                            folder.rmdir()
                raise

    def check_free(self, resume: bool) -> None:
        """Refuses a folder that another run has been written to, before anything is written.

        Raises:
            UserError: It is not empty and the run is not to be resumed, or it is not a folder.
        """
        try:
            for parent in (self.path, *self.path.parents):
                if parent.exists() and not parent.is_dir():
                    raise UserError(f"run folder {self.path}: {parent} is a file; choose another run.dir or run.name")
            used = self.path.is_dir() and any(child.name != ".lock" for child in self.path.iterdir())
        except OSError as error:  # a name too long, a folder that may not be read
            raise UserError(
                f"run folder {self.path}: cannot be used ({error.strerror}); choose another run.dir or run.name"
            ) from None
        if not resume and used:
            raise UserError(
                f"run folder {self.path} is not empty: continue that run with run.resume=true, "
                "or choose another run.name or run.dir"
            )

    def open(self, config: RunConfig) -> None:
        """Makes the folder and writes the configuration.

        Raises:
            UserError: It cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.config_file.exists():
                _warn_of_changes(load_config(self.config_file), config)
            write_whole(
                self.config_file,
                f"# The configuration of this run, whole. To repeat it under another name:\n"
                f"#   python -m distmoe train {self.config_file} run.name=NAME\n"
                f"{config_to_yaml(_as_repeated(config))}",
            )
        except OSError as error:
            raise UserError(
                f"run folder {self.path}: cannot be written ({error.strerror}); "
                "make it writable or choose another run.dir"
            ) from None

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes ``summary.json`` whole or not at all."""
        write_json(self.summary_file, summary)

    def read_summary(self) -> dict[str, Any] | None:
        """The results, or None while the run is not finished."""
        if not self.summary_file.exists():
            return None
        try:
            summary: dict[str, Any] = json.loads(self.summary_file.read_text())
            if not isinstance(summary, dict) or not isinstance(summary.get("test_accuracy"), float):
                raise ValueError("it holds no test_accuracy")
        except (OSError, ValueError) as error:
            raise UserError(f"{self.summary_file}: cannot be read ({error}); remove it and resume the run") from None
        return summary

    def selected(self, select: str, fall_back: bool = False, control: Control | None = None) -> Checkpoint:
        """The checkpoint that is tested: the best on validation, or the last. Collective.

        Args:
            select: ``best`` or ``last``.
            fall_back: Whether the newest stands in, with a warning, for a best one that is damaged.
            control: Of all ranks; None: there is one.

        Raises:
            UserError: There is no whole checkpoint, or the best one is damaged; on all ranks alike.
        """
        checkpoints = self.checkpoints()

        def selects_itself(state: TrainingState) -> bool:
            return select == "last" or state.best is None or state.best.step == state.progress.step

        # Of one that only tells which is the best, the tensors are not needed.
        newest = checkpoints.newest(control=control, needed=selects_itself)
        if newest is not None and not selects_itself(newest.state):
            assert newest.state.best is not None, "it would select itself"
            try:
                return load_checkpoint(checkpoints.path(newest.state.best.step), control)
            except DamagedCheckpointError as error:
                if not fall_back:
                    raise
                if control is None or control.is_main:
                    logger.warning("%s; taking the newest instead of the best", error)
            newest = checkpoints.newest(control=control)
        if newest is None:
            raise UserError(f"run {self.path}: no whole checkpoint in it; train it first")
        return newest


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all.

    Raises:
        UserError: It cannot be written.
    """
    try:
        write_whole(path, json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free space or make the folder writable"
        ) from None


def write_whole(path: Path, text: str) -> None:
    """Writes a text file whole or not at all; OSError if it cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _as_repeated(config: RunConfig) -> RunConfig:
    """Without what was said of this start of the run only."""
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"resume": False}),
            "train": config.train.model_copy(update={"stop_after_steps": None}),
        }
    )


def _warn_of_changes(before: RunConfig, now: RunConfig) -> None:
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    ignored = {"run.resume", "run.dir", "run.name", "train.stop_after_steps"}
    changed = sorted(key for key in {*old, *new} - ignored if old.get(key) != new.get(key))
    for key in changed:
        if key.startswith("parallel."):  # any layout may go on, and the log names it
            continue
        logger.warning("resumed with another %s: %s, was %s", key, new.get(key), old.get(key))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
