"""The folders of a run: whether they may be written, and have room for what the run will write."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from distmoe.config import RunConfig
from distmoe.contracts import DataSpec, UserError
from distmoe.doctor.dataset import Dataset
from distmoe.doctor.findings import Finding, fail, ok, refused, size, warn
from distmoe.models import build_model
from distmoe.training.forecast import training_of
from distmoe.training.run_folder import RunFolder

_OTHER_BYTES = 2**24  # metrics, TensorBoard's events, the configuration
_DRAWS = re.compile(r"(\w+_)?(normal|uniform)_")  # of tensors, and of torch.nn.init


@dataclass(frozen=True)
class _Folder:
    """One that is written to.

    Attributes:
        key: Of the configuration.
        path: It.
        num_bytes: That will be written, at most at one time.
        what: They are.
    """

    key: str
    path: Path
    num_bytes: int
    what: str

    @property
    def existing(self) -> Path:
        """It, or the folder in which it will be made."""
        path = self.path.absolute()
        return next(one for one in (path, *path.parents) if os.path.isdir(one))


def examine_storage(config: RunConfig, dataset: Dataset, here: bool) -> list[Finding]:
    """The run's folder and, where data is still to be prepared, that of the prepared data.

    Args:
        config: The run.
        dataset: What is known of its data.
        here: Whether the run is to be on this machine; otherwise its folders need not be here.
    """
    run = RunFolder.of(config)
    findings = []
    checkpoint = None
    if dataset.spec is not None:
        try:
            checkpoint = checkpoint_bytes(config, dataset.spec)
        except UserError as error:
            findings.append(refused("model", error))
    num_checkpoints = config.run.keep_checkpoints + 2  # the best on validation, and the one that is being written
    there = _bytes_below(run.checkpoints().root)
    needed = max(num_checkpoints * (checkpoint or 0) - there, checkpoint or 0) + _OTHER_BYTES
    what = f"{num_checkpoints} checkpoints of {size(checkpoint)}" if checkpoint else "checkpoints of unknown size"
    folders = [_Folder("run.dir", Path(config.run.dir), needed, what)]
    if dataset.unprepared_bytes:
        key = "data.prepared_dir" if config.data.prepared_dir else "data.root"
        path = Path(config.data.prepared_dir or config.data.root)
        folders.append(_Folder(key, path, dataset.unprepared_bytes, "prepared data"))
    findings += [_examine(folder, folders, here) for folder in folders]
    return [*findings, *_state(run, config.run.resume, here)]


def _state(run: RunFolder, resume: bool, here: bool) -> Iterator[Finding]:
    """Whether the run's own folder is one, and free for it."""
    try:
        run.check_free(resume=True)
    except UserError as error:
        yield replace(refused("run folder", error), level="fail" if here else "warn")
        return
    try:
        run.check_free(resume)
    except UserError as error:  # it may be this run that is going on, or that has been finished
        found, _, remedy = str(error).partition(": ")
        yield warn("run folder", found, remedy)


def checkpoint_bytes(config: RunConfig, spec: DataSpec) -> int:
    """Of one checkpoint: weights, moments, averages and buffers; takes no memory and draws nothing.

    Raises:
        UserError: The model does not fit the data.
    """
    with torch.device("meta"), _WithoutDraws():
        model = build_model(config, spec)
    copies = 1 + training_of(config).moments + (config.train.ema_decay is not None)
    weights = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    return copies * weights * torch.float32.itemsize + buffers


class _WithoutDraws(TorchFunctionMode):
    """Leaves out what draws initial weights: on tensors without memory it does nothing, and takes torch 3 s to load."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _DRAWS.fullmatch(getattr(func, "__name__", "")):
            return next(iter((*args, *kwargs.values())))  # the tensor itself
        return func(*args, **kwargs)


def _examine(folder: _Folder, folders: list[_Folder], here: bool) -> Finding:
    existing = folder.existing
    bad = fail if here else warn
    try:
        with tempfile.TemporaryFile(dir=existing):  # access rights do not tell of read-only disks, nor of quotas
            pass
        usage = shutil.disk_usage(existing)
    except OSError as error:
        return bad(
            folder.key,
            f"{folder.path} cannot be written ({error.strerror}: {existing})",
            f"make {existing} writable and leave space on it, or set {folder.key} to another folder",
        )
    same_disk = [one for one in folders if os.stat(one.existing).st_dev == os.stat(existing).st_dev]
    needed = sum(one.num_bytes for one in same_disk)
    found = f"{folder.path}: {size(usage.free)} of {size(usage.total)} free; {folder.what}"
    if usage.free >= needed:
        return ok(folder.key, found)
    less = f"free space there, or set {folder.key} to a folder on another disk"
    if folder.key == "run.dir":
        less += ", or lower run.keep_checkpoints"
    return warn(folder.key, f"{found}, in all {size(needed)} on this disk", less)


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:  # a run is going on, and has removed it
                continue
    return total
