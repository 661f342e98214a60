"""TensorBoard's view of a run: the numbers of ``metrics.jsonl``, expert loads, class-by-expert heat maps."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from distmoe.contracts import DataSpec, UserError
from distmoe.training.evaluation import Evaluation, class_shares
from distmoe.training.figures import class_expert_figure


class TensorBoardLog:
    """Event files in the run's folder.

    Args:
        folder: Made if missing.
        resume_step: Points of later steps, written before an interruption, are hidden, also where nothing was saved.

    Raises:
        UserError: The files cannot be written; from every method, as a thread of the writer's own does the writing.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        self._folder = folder
        with self._disk_errors():
            self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1, flush_secs=10)

    def training(self, numbers: Mapping[str, Any], loads: Mapping[str, Tensor], step: int) -> None:
        """One log interval: scalars under ``train/`` (a layer's under its name), and each expert's load."""
        with self._disk_errors():
            for name, value in numbers.items():
                if name not in ("step", "epoch"):
                    self._writer.add_scalar(name if "/" in name else f"train/{name}", value, step)
            for layer, load_E in loads.items():
                for expert, share in enumerate(load_E.tolist()):
                    self._writer.add_scalar(f"{layer}/load/expert_{expert}", share, step)

    def evaluation(self, split: str, result: Evaluation, spec: DataSpec, step: int) -> None:
        """One evaluation: accuracy, loss, and a heat map for each layer."""
        with self._disk_errors():
            self._writer.add_scalar(f"{split}/accuracy", result.accuracy, step)
            self._writer.add_scalar(f"{split}/loss", result.loss, step)
            for layer, sums in result.layers.items():
                title = f"{layer}, {split}, step {step}"
                figure = class_expert_figure(class_shares(sums), spec.class_names, title)
                self._writer.add_figure(f"{layer}/class_by_expert_{split}", figure, step)

    def flush(self) -> None:
        """What was given so far is in the file, whatever happens to this process."""
        with self._disk_errors():
            self._writer.flush()

    def __enter__(self) -> "TensorBoardLog":
        self._excepthook = threading.excepthook
        threading.excepthook = self._on_thread_error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._disk_errors():
                self._writer.close()
        finally:
            threading.excepthook = self._excepthook

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._folder}: cannot be written ({error.strerror}); free space or make it writable, then go on "
                "with run.resume=true"
            ) from None

    def _on_thread_error(self, args: threading.ExceptHookArgs) -> None:
        """The writer's thread passes its error on to the next call; it need not print a traceback as well."""
        if not isinstance(args.exc_value, OSError):
            self._excepthook(args)
