"""The loader that reads prepared ``.beton`` files through FFCV: decode and copy, nothing else.

FFCV's own loop is kept for reading ahead in a thread, and changed where it can bite:

* a thread that dies leaves FFCV's consumer waiting for ever: here the error travels with the end of the stream, and
  the consumer looks at the thread while it waits;
* batches are views of a ring of buffers that the thread writes again: here every batch is a copy (0.1 ms a batch of
  256 CIFAR images);
* FFCV sets torch's thread count in its constructor, in ``iter()`` and in its thread: here it is put back after the
  first, and the other two are not called;
* leaving an epoch early leaves the thread behind: here it is stopped and joined;
* a damaged file makes compiled code read outside of it: here the tables are checked when it is opened.
"""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Empty, Full
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from distmoe.contracts import Batch, UserError
from distmoe.data import ffcv_package as ffcv
from distmoe.data.index_plan import PlannedBatch
from distmoe.data.loaders.resident import to_input
from distmoe.data.prepared import PreparedSplit

_POLL_S = 0.1
_JOIN_S = 10.0  # a thread in the middle of compiling takes a second; one that hangs is left to itself
_BATCHES_AHEAD = 3
_REMEDY = "run `python -m distmoe prepare CONFIG`, which writes it anew where it is damaged"


class FFCVLoader:
    """A prepared split, read through FFCV.

    Args:
        prepared: The split's file and what is in it.
        num_workers: Threads that decode a batch; more than this process may use are not started. One is enough for
            samples that are copied and not decoded, and is compiled several times faster.
        timeout_s: Seconds without a batch after which the reading thread is given up.

    Raises:
        UserError: The file cannot be read, is damaged, or is not what ``prepared`` says.
    """

    def __init__(self, prepared: PreparedSplit, num_workers: int = 1, timeout_s: float = 60.0) -> None:
        self._path = prepared.path
        self._prepared = prepared
        self._num_workers = allowed_workers(num_workers)
        self._timeout_s = timeout_s
        self._order = _PlannedOrder()
        self._loader: Any = None
        self._readers: set[_ReadingThread] = set()
        self._status = self._check()

    def batches(self, planned: Sequence[PlannedBatch]) -> Iterator[Batch]:
        """See :class:`distmoe.data.loaders.protocol.Loader`; every batch is memory of its own."""
        if not planned:
            return
        if self._loader is None:
            self._loader = self._open()
        reader = self._start(planned)
        try:
            for plan in planned:
                yield self._copy(plan, reader.next_fields())
        finally:
            reader.stop()
            self._readers.discard(reader)

    def close(self) -> None:
        """Stops what still reads and lets go of the file."""
        for reader in self._readers:
            reader.stop()
        self._readers.clear()
        self._loader = None

    def _check(self) -> os.stat_result:
        check_file(self._path, self._prepared.num_samples, set(build_pipelines(self._prepared)))
        return self._path.stat()

    def _open(self) -> Any:
        """FFCV's loader of the file, made when it is first used: compiling takes a second for each split."""
        self._status = self._check()
        with ffcv.keep_torch_threads():
            loader = ffcv.Loader(
                str(self._path),
                batch_size=1,  # set for each plan; the compiled code does not depend on it
                num_workers=self._num_workers,
                order=self._order,
                pipelines=build_pipelines(self._prepared),
                drop_last=False,
                batches_ahead=_BATCHES_AHEAD,
            )
        # Mapped now and kept: whoever replaces the file later does not disturb this mapping.
        loader.memory_manager.context.__enter__()
        return loader

    def _start(self, planned: Sequence[PlannedBatch]) -> "_ReadingThread":
        rows = {len(plan.sample_ids) for plan in planned}
        if len(rows) != 1 or 0 in rows:
            raise ValueError(f"planned batches must all have one length above 0, not {sorted(rows)}")
        ids = torch.cat([plan.sample_ids for plan in planned])
        if ids.min() < 0 or ids.max() >= self._prepared.num_samples:  # compiled code would read outside
            raise ValueError(f"sample ids must be in 0..{self._prepared.num_samples - 1}: {self._path} has no others")
        self._check_not_cut()
        self._order.ids = ids.numpy().astype(np.uint64)
        self._loader.batch_size = rows.pop()
        reader = _ReadingThread(self._loader, self._path, self._timeout_s)
        self._readers.add(reader)
        return reader

    def _check_not_cut(self) -> None:
        """A mapped file that is cut short kills the process when it is read (SIGBUS), so look first."""
        try:
            now = self._path.stat()
        except FileNotFoundError:
            return  # removed or renamed: the mapping still has it
        if now.st_ino == self._status.st_ino and now.st_size != self._status.st_size:
            raise UserError(
                f"{self._path} had {self._status.st_size} bytes when it was opened and has {now.st_size} now: {_REMEDY}"
            )

    def _copy(self, plan: PlannedBatch, fields: dict[str, Tensor]) -> Batch:
        # squeeze(1), because without a dimension a batch of one sample would lose its batch dimension as well
        if not torch.equal(fields["index"].squeeze(1), plan.sample_ids):
            raise UserError(f"{self._path} holds other samples than the plan asks for: {_REMEDY}")
        # numpy copies in this thread. torch would share the work with its own, and where cores are busy waiting for
        # them takes milliseconds: ten times the copy.
        kept = {name: torch.from_numpy(values.numpy()[: plan.num_valid].copy()) for name, values in fields.items()}
        return Batch(
            images=to_input(kept["image"]),
            labels=kept["label"].squeeze(1),
            sample_ids=plan.sample_ids[: plan.num_valid],
            factors={name: kept[field] for name, (field, _) in self._prepared.factor_fields.items()},
        )


class _PlannedOrder(ffcv.TraversalOrder):
    """Tells FFCV which samples to read: those of the plan at hand."""

    def __init__(self) -> None:
        self.ids = np.zeros(0, dtype=np.uint64)

    def __call__(self, loader: Any) -> "_PlannedOrder":
        """FFCV calls an order given as an instance, as if it were a class."""
        return self

    def sample_order(self, epoch: int) -> Any:
        return self.ids


class _ReadingThread(ffcv.EpochIterator):
    """FFCV's reading thread and its queue, with an end that always arrives.

    The thread starts in the constructor. Its loop never waits without looking whether it was told to stop.
    """

    def __init__(self, loader: Any, path: Path, timeout_s: float) -> None:
        self.path = path
        self.timeout_s = timeout_s
        self.error: BaseException | None = None
        super().__init__(loader, loader.next_traversal_order())

    def run(self) -> None:
        """Reads batch after batch into the ring of buffers; the thread's main function."""
        try:
            if self.loader.num_workers > 1:
                numba.set_num_threads(self.loader.num_workers)  # counts for this thread alone
            num_slots = self.loader.batches_ahead + 2
            for number, ids in enumerate(self.iter_ixes):
                if not self._offer(self.run_pipeline(number, ids, number % num_slots, None)):
                    return
        except BaseException as error:  # whatever it is, it belongs to the consumer
            self.error = error
        self._offer(None)

    def next_fields(self) -> dict[str, Tensor]:
        """The next batch by field name: views of buffers that are written again, so copy what is kept.

        Raises:
            RuntimeError: The thread died, with its exception as the cause, or has been silent for too long.
        """
        result = self._wait()
        if result is None:
            reason = self.error or "no reason known"
            raise RuntimeError(f"the thread that reads {self.path} ended early: {reason}") from self.error
        return dict(zip(self.loader.pipeline_specs, result, strict=True))

    def _wait(self) -> tuple[Tensor, ...] | None:
        """What the thread delivers next; None when it has come to its end or died."""
        give_up = time.monotonic() + self.timeout_s
        while not self.terminate_event.is_set():
            alive = self.is_alive()  # before the look into the queue: what it put there last is still found
            try:
                result: tuple[Tensor, ...] | None = self.output_queue.get(timeout=_POLL_S if alive else 0)
                return result
            except Empty:
                if not alive:
                    return None
                if time.monotonic() > give_up:
                    raise RuntimeError(
                        f"the thread that reads {self.path} has delivered nothing for {self.timeout_s:g} s"
                    ) from None
        raise RuntimeError(f"the loader of {self.path} was closed while it was read")

    def stop(self) -> None:
        """Ends the thread, wherever it is, and waits for it; safe to call twice."""
        self.terminate_event.set()
        while not self.output_queue.empty():  # a thread that waits for a place in the queue goes on at once
            self.output_queue.get_nowait()
        self.join(timeout=_JOIN_S)
        self.close()
        self.closed = True

    def _offer(self, item: tuple[Tensor, ...] | None) -> bool:
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(item, timeout=_POLL_S)
            except Full:
                continue
            return True
        return False


def build_pipelines(prepared: PreparedSplit) -> dict[str, list[Any]]:
    """FFCV's operations for each field of a prepared split: decode into the buffer, show it as a tensor.

    Lists are made anew for each loader, because FFCV takes the decoder out of the list it is given.
    """
    decoder = ffcv.SimpleRGBImageDecoder if prepared.is_rgb else ffcv.NDArrayDecoder
    pipelines = {"image": [decoder(), ffcv.ToTensor()]}
    pipelines |= {name: [ffcv.IntDecoder(), ffcv.ToTensor()] for name in ("label", "index")}
    pipelines |= {field: [ffcv.NDArrayDecoder(), ffcv.ToTensor()] for field, _ in prepared.factor_fields.values()}
    check_operations(pipelines)
    return pipelines


def check_operations(pipelines: dict[str, list[Any]]) -> None:
    """Refuses a pipeline that FFCV's constructor would chew on for ever: a compiled operation after ``ToTensor``.

    Raises:
        ValueError: ``ToTensor`` is not the last operation of a field.
    """
    for field, operations in pipelines.items():
        if [isinstance(operation, ffcv.ToTensor) for operation in operations] != [False] * (len(operations) - 1) + [
            True
        ]:
            names = " -> ".join(type(operation).__name__ for operation in operations)
            raise ValueError(f"FFCV pipeline of field {field}: {names}; ToTensor must come last, and once")


def allowed_workers(wanted: int) -> int:
    """``wanted``, or as many threads as this process may run and numba has started, where that is less; at least 1.

    FFCV itself counts the machine's cores, and numba refuses more threads than the process is bound to.
    """
    return max(1, min(wanted, len(os.sched_getaffinity(0)), numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]  # set at run time


def check_file(path: Path, num_samples: int, fields: set[str]) -> None:
    """Opens a ``.beton`` file's tables and checks that they are whole, belong together and point inside the file.

    Raises:
        UserError: They do not, or the file cannot be read.
    """
    try:
        reader = ffcv.Reader(str(path))
        size = path.stat().st_size
        table = reader.alloc_table
        end = int((table["ptr"] + table["size"]).max(initial=0))
        missing = sorted(fields - set(reader.field_names))
    except Exception as error:  # on a foreign file anything can fail in there
        raise UserError(f"cannot read {path}: {error or type(error).__name__}; {_REMEDY}") from error
    if missing:
        raise UserError(f"{path} has no field {', '.join(missing)}: {_REMEDY}")
    if len(reader.metadata) != num_samples:
        raise UserError(f"{path} holds {len(reader.metadata)} samples where {num_samples} are expected: {_REMEDY}")
    num_stored = num_samples * len(fields - {"label", "index"})  # those two lie in the tables themselves
    if len(table) != num_stored or end > size:
        raise UserError(
            f"{path} is damaged: {len(table)} of {num_stored} stored values are listed, up to byte {end} of {size}; "
            f"{_REMEDY}"
        )
