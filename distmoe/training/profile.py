"""A torch profile of a few steps, written into the run's folder."""

import errno
import logging
import shutil
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

from distmoe.contracts import UserError

logger = logging.getLogger(__name__)

WARMUP_STEPS = 5  # compilation, caches and the first reads are over by then


class Profile:
    """Records ``num_steps`` optimizer steps after the warm-up, once; does nothing for None.

    Writes ``profile/trace.json`` (open it in Perfetto or chrome://tracing) and ``profile/operators.txt``.
    """

    def __init__(self, num_steps: int | None, folder: Path) -> None:
        self._folder = folder / "profile"
        self._num_steps = num_steps
        self._steps_done = 0
        self._profiler: profile | None = None  # while it records
        self._written = False

    def step(self) -> None:
        """An optimizer step is over."""
        self._steps_done += 1
        if self._num_steps is None:
            return
        # Started and stopped here rather than by a schedule: torch 2.11 crashes when one ends in its warm-up.
        if self._steps_done == WARMUP_STEPS:
            self._profiler = profile(
                activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available(),
                acc_events=True,  # there is one cycle only; torch 2.11 warns without it
            )
            self._profiler.start()
        elif self._steps_done == WARMUP_STEPS + self._num_steps:
            self._finish()

    def _finish(self) -> None:
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            profiler.stop()
            if self._steps_done > WARMUP_STEPS:
                self._write(profiler)

    def _write(self, profiler: profile) -> None:
        trace = self._folder / "trace.json"
        try:
            if self._folder.exists():
                shutil.rmtree(self._folder)
            self._folder.mkdir(parents=True)
            profiler.export_chrome_trace(str(trace))
            if not trace.is_file():  # torch only logs it
                raise OSError(errno.EIO, "torch could not write trace.json")
            table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
            (self._folder / "operators.txt").write_text(table)
        except OSError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise UserError(f"{self._folder}: cannot be written ({error.strerror}); free space and resume") from None
        self._written = True
        logger.info("wrote %s", self._folder)

    def __enter__(self) -> "Profile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()  # a run that ends early gives what there is
        if self._num_steps is not None and not self._written:
            logger.warning("no profile written: the run ended within its %d warm-up steps", WARMUP_STEPS)
