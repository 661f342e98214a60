"""Metrics of a run: one JSON line a log interval or evaluation.

``metrics.jsonl`` is the record; TensorBoard and the console show the same numbers. Keys: docs/metrics.md.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from distmoe.contracts import UserError
from distmoe.moe.measures import describe_routing, routing_sums
from distmoe.moe.sums import Reducer, add_sums, no_reduction, reduce_together
from distmoe.training.run_folder import write_whole
from distmoe.training.step import StepResult

_TOTALS = "all layers"  # no layer is called so: names of modules have no spaces


class MetricsFile:
    """``metrics.jsonl``: appended line by line, each line flushed.

    Args:
        path: The file.
        resume_step: Lines of later steps are cut off: they belong to a past that did not happen.
        evaluated: Whether the validation of ``resume_step`` is done; otherwise its line is cut off as well. A test
            line always is: a run that is resumed has still to be tested.

    Raises:
        UserError: The file cannot be written.
    """

    def __init__(self, path: Path, resume_step: int, evaluated: bool = True) -> None:
        self.path = path
        redone = ("test",) if evaluated else ("test", "validation")
        try:
            lines = read_metrics(path) if path.exists() else iter(())
            kept = [
                line
                for line in lines
                if line["step"] < resume_step or (line["step"] == resume_step and line.get("split") not in redone)
            ]
            write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
            self._file = path.open("a")
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); free space or choose another run.dir"
            ) from None

    def write(self, values: Mapping[str, Any]) -> None:
        """Appends one line."""
        whole = os.fstat(self._file.fileno()).st_size
        try:
            # JSON has no infinities: a gradient norm of a skipped fp16 step becomes null.
            finite = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in values.items()
            }
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # closing tries once more to write the rest
                self._file.close()
            with contextlib.suppress(OSError):
                os.truncate(self.path, whole)
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); free space and resume") from None

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics file; a line cut off by a crash ends it."""
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            return
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            return
        yield line


class Interval:
    """What happened since the last log line. Sums stay on the device, and on their rank, until :meth:`describe`."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Starts anew."""
        self._sums: dict[str, Tensor] = {}
        self._auxiliary: dict[str, Tensor] = {}
        self._last: StepResult | None = None
        self._steps = 0
        self._health: Tensor | None = None

    def add(self, result: StepResult) -> None:
        """One optimizer step."""
        add_sums(self._sums, result.sums)
        add_sums(self._auxiliary, {name: value.double() for name, value in result.auxiliary.items()})
        self._last = result
        self._steps += 1
        self._health = result.health if self._health is None else self._health + result.health

    def collect(self, reducer: Reducer) -> None:
        """Moves the sums of all ranks to rank 0, before they are saved. Collective.

        They add up to the same as before, and in the order in which a run resumed from there adds them up.
        """
        self._sums = dict(reducer(self._sums))
        self.keep_on_main(reducer.rank)

    def keep_on_main(self, rank: int) -> None:
        """On ranks above 0, takes the sums away that rank 0 has as well."""
        if rank > 0:
            self._sums = {name: torch.zeros_like(value) for name, value in self._sums.items()}

    def state(self) -> dict[str, float]:
        """What a resumed run needs to write the same next line; on rank 0, after :meth:`collect`."""
        named = {"sums": self._sums, "auxiliary": self._auxiliary}
        values = {f"{kind}:{name}": float(value) for kind, sums in named.items() for name, value in sums.items()}
        return {"steps": self._steps, **values}

    def load(self, state: Mapping[str, float], device: torch.device) -> None:
        """Continues from :meth:`state`."""
        self.clear()
        self._steps = int(state.get("steps", 0))
        for key, value in state.items():
            kind, _, name = key.partition(":")
            if name:
                sums = self._sums if kind == "sums" else self._auxiliary
                sums[name] = torch.tensor(value, dtype=torch.float64, device=device)

    def finite(self) -> bool:
        """Whether every loss and gradient norm of the interval was finite on this rank. Waits for the device."""
        return self._health is None or math.isfinite(float(self._health))

    def describe(
        self, weights: Mapping[str, float], reducer: Reducer = no_reduction
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The numbers of a log line. Collective: ``reducer`` is called once.

        Args:
            weights: Of the auxiliary losses, for ``loss``.
            reducer: Adds sums over ranks.

        Returns:
            Means over the interval, with the last step's routing by layer; and for each layer (E,) the share of that
            step's assignments that each expert has.
        """
        assert self._last is not None, "nothing was added"
        own = {layer: routing_sums(routing) for layer, routing in self._last.routings.items()}
        layers = reduce_together(reducer, {_TOTALS: self._sums, **own})
        totals = layers.pop(_TOTALS)
        samples = float(totals["samples"])
        auxiliary = {name: float(value) / self._steps for name, value in self._auxiliary.items()}
        numbers = {
            "loss": float(totals["loss"]) / samples + sum(weights[name] * one for name, one in auxiliary.items()),
            "cross_entropy": float(totals["cross_entropy"]) / samples,
            **auxiliary,
            "accuracy": float(totals["correct"]) / samples,
            "gradient_norm": float(self._last.gradient_norm),
        }
        for layer, sums in layers.items():
            numbers |= {f"{layer}/{name}": value for name, value in describe_routing(sums).items()}
        assigned = {layer: sums["assignments_E"].cpu() for layer, sums in layers.items()}
        return numbers, {layer: load / load.sum().clamp(min=1) for layer, load in assigned.items()}
