"""Writes one split as an FFCV ``.beton`` file. Importing this module imports ffcv, which takes seconds.

FFCV's own writer forks workers and waits for them by counting: if one fails, it waits for ever; a partial write to a
full disk it does not notice. :class:`SerialWriter` runs the same code in this process, where an error is an error, and
checks the size of what it wrote.
"""

import errno
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from distmoe.contracts import UserError
from distmoe.data.ffcv_package import DatasetWriter, IntField, NDArrayField, RGBImageField
from distmoe.data.split import Array, Split

# isort: split
# After ffcv_package, which is the one that knows how to import ffcv for the first time.
from ffcv.memory_allocator import MemoryAllocator
from ffcv.types import ALLOC_TABLE_TYPE
from ffcv.writer import handle_sample

PAGE_BYTES = 1 << 23  # FFCV's default; a larger sample gets larger pages
MAX_PAGE_BYTES = 1 << 31


class _Pages(MemoryAllocator):
    """FFCV's pages, with a file that is closed after an error too."""

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            if error is None:
                self.flush_page()
        finally:
            self.fp.close()


class SerialWriter(DatasetWriter):
    """FFCV's writer without its worker processes and its progress bar."""

    def _write_common(
        self, num_samples: int, queue_content: Iterable[Any], work_fn: Any, extra_worker_args: Any
    ) -> None:
        (dataset,) = extra_worker_args
        self.num_samples = num_samples
        self.prepare()
        # FFCV shares the table of samples with its workers; here is nobody to share it with.
        shared: Any = self.metadata_sm
        shared.close()
        shared.unlink()
        metadata = np.zeros(num_samples, dtype=self.metadata_type)
        allocator = _Pages(self.fname, self.data_region_start, self.page_size)
        with allocator:
            for chunk in queue_content:
                for row, sample_id in chunk:
                    handle_sample(dataset[sample_id], row, metadata.dtype.names, metadata, allocator, self.fields)
        end_of_pages = allocator.offset + allocator.next_page_written.value * self.page_size
        self._check_size(end_of_pages)
        self.metadata_sm: Any = SimpleNamespace(buf=metadata.tobytes())
        self.finalize(allocator.allocations)
        self._check_size(end_of_pages + len(allocator.allocations) * ALLOC_TABLE_TYPE.itemsize)

    def _check_size(self, expected: int) -> None:
        size = os.path.getsize(self.fname)
        if size != expected:
            raise OSError(errno.ENOSPC, f"{size} bytes arrived of {expected}", self.fname)


class _Rows:
    """A split as the writer wants it: indexable, one tuple of fields a sample."""

    def __init__(self, split: Split):
        self.columns: list[Array] = list(split.factors.values())
        self.split = split

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, row: int) -> tuple[Any, ...]:
        factors = (column[row] for column in self.columns)
        return (self.split.inputs[row], int(self.split.labels[row]), row, *factors)


def write(path: Path, split: Split, is_rgb: bool, factor_fields: Mapping[str, tuple[str, int]]) -> None:
    """Writes ``split`` to ``path`` with the fields ``image``, ``label``, ``index`` and one a factor, and syncs it.

    Args:
        path: A temporary file; what it held is lost.
        split: The samples, in the order in which they are numbered.
        is_rgb: Whether samples are (H, W, 3) uint8 images and go into an image field.
        factor_fields: Field name and width of each factor, in the order of ``split.factors``.

    Raises:
        OSError: The disk is full or the folder cannot be written.
        UserError: A sample is too large for a page.
    """
    sample = split.inputs[0]
    sample_bytes = sample.nbytes + sum(4 * width for _, width in factor_fields.values())
    if sample_bytes > MAX_PAGE_BYTES:
        raise UserError(
            f"{path.name}: a sample of {sample_bytes} bytes does not fit into FFCV's pages of at most "
            f"{MAX_PAGE_BYTES}; use data.loader=resident"
        )
    image = RGBImageField(write_mode="raw") if is_rgb else NDArrayField(sample.dtype, sample.shape)
    fields = {"image": image, "label": IntField(), "index": IntField()}
    for field_name, width in factor_fields.values():
        fields[field_name] = NDArrayField(np.dtype(np.float32), (width,))
    page_bytes = max(PAGE_BYTES, 1 << (sample_bytes - 1).bit_length())
    SerialWriter(str(path), fields, page_size=page_bytes, num_workers=1).from_indexed_dataset(_Rows(split))
    with path.open("rb") as file:
        os.fsync(file.fileno())
