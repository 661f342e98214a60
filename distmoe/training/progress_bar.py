"""Progress for a person: a bar on a terminal, plain lines in a log."""

import logging
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger(__name__)


class ProgressBar:
    """Steps done of all steps.

    Args:
        total_steps: Of the whole run.
        first_step: Steps done before this process.
    """

    def __init__(self, total_steps: int, first_step: int) -> None:
        self._total = total_steps
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps, initial=first_step, disable=not self._terminal, unit="step", dynamic_ncols=True
        )
        self._stack = ExitStack()

    def update(self, step: int) -> None:
        """``step`` steps are done."""
        self._bar.update(step - self._bar.n if self._terminal else 0)

    def log(self, numbers: Mapping[str, Any]) -> None:
        """A log interval (on a terminal, behind the bar) or an evaluation (a line of its own)."""
        if "split" in numbers:
            logger.info(
                "step %d/%d, %s accuracy %.4f, loss %.4f",
                numbers["step"], self._total, numbers["split"], numbers["accuracy"], numbers["loss"],
            )  # fmt: skip
        elif self._terminal:
            self._bar.set_postfix_str(
                f"loss {numbers['loss']:.3f}, {numbers['images_per_second']:.0f} img/s", refresh=False
            )
        else:
            logger.info(
                "step %d/%d, loss %.4f, accuracy %.4f, lr %.3g, %.0f img/s, data wait %.1f %%",
                numbers["step"], self._total, numbers["loss"], numbers["accuracy"], numbers["lr"],
                numbers["images_per_second"], 100 * numbers["data_wait_share"],
            )  # fmt: skip

    def __enter__(self) -> "ProgressBar":
        if self._terminal:
            self._stack.enter_context(logging_redirect_tqdm())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self._stack.close()
