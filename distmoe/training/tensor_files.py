"""Tensors in safetensors files: pieces of canonical tensors, written by all ranks at once, and read back in ranges.

Every rank writes one file, ``tensors-00002-of-00004.safetensors``, of pieces as 1-D tensors with the keys
``kind/name/start``. The *index* says for every canonical tensor which range of it is in which file, so that any rank of
any layout finds what it needs, and reads no more.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from distmoe.parallel.shards import BUFFER, Piece
from distmoe.training.integrity import unseen

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor to be written.

    Attributes:
        key: Its name in the file.
        dtype: Of its elements.
        shape: Its shape.
        values: Gives the elements, when their turn has come; on any device.
    """

    key: str
    dtype: torch.dtype
    shape: torch.Size
    values: Callable[[], Tensor]


@dataclass(frozen=True)
class Segment:
    """A range of a flattened canonical tensor and the file it is in."""

    start: int
    stop: int
    file: str


@dataclass(frozen=True)
class StoredTensor:
    """A canonical tensor in the files of a checkpoint.

    Attributes:
        shape: Its shape, with all experts.
        dtype: Of its elements.
        segments: Where they are, in order; together each element once.
    """

    shape: torch.Size
    dtype: torch.dtype
    segments: tuple[Segment, ...]


Index = Mapping[tuple[str, str], StoredTensor]
"""By kind and canonical name."""


def write_safetensors(path: Path, entries: Iterable[Entry], metadata: Mapping[str, str]) -> str:
    """Writes tensors one after the other, flushes them to disk, and gives the SHA-256 of the file.

    At no time is there more than one tensor's copy, which the library's own function would make of all of them.

    Raises:
        OSError: The file cannot be written.
        ValueError: A key comes twice.
    """
    # Wide elements first: every tensor then begins at a multiple of its element's size.
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for entry in ordered:
        if entry.key in header:
            raise ValueError(f"{entry.key} would be written twice")
        end = offset + entry.shape.numel() * entry.dtype.itemsize
        header[entry.key] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            file.write(part)
            digest.update(part)
        for entry in ordered:
            values = entry.values().detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            file.write(values.data)
            digest.update(values.data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def piece_file(rank: int, world_size: int) -> str:
    """Name of the file of a rank's pieces."""
    return f"tensors-{rank + 1:05d}-of-{world_size:05d}.safetensors"


def write_pieces(path: Path, pieces: Iterable[Piece]) -> tuple[str, list[dict[str, Any]]]:
    """Writes one rank's file of pieces.

    Returns:
        Its SHA-256, and for each piece a row of plain values for :func:`merge`.

    Raises:
        OSError: The file cannot be written.
        ValueError: A piece comes twice.
    """
    listed = list(pieces)
    checksum = write_safetensors(path, map(_entry, listed), {})
    rows = [
        {
            "kind": piece.kind,
            "name": piece.name,
            "shape": list(piece.shape),
            "dtype": _DTYPE_NAMES[piece.values.dtype],
            "segments": [[piece.start, piece.start + piece.values.numel(), path.name]],
        }
        for piece in listed
    ]
    return checksum, rows


def merge(rows: Iterable[Mapping[str, Any]]) -> Index:
    """The index of pieces of all ranks, or of an index in plain values.

    Raises:
        ValueError: Something is not covered, or twice, or a tensor has two shapes or types.
    """
    index: dict[tuple[str, str], StoredTensor] = {}
    for row in rows:
        key = (row["kind"], row["name"])
        segments = tuple(Segment(int(start), int(stop), str(file)) for start, stop, file in row["segments"])
        more = StoredTensor(torch.Size(row["shape"]), DTYPES[row["dtype"]], segments)
        before = index.get(key, StoredTensor(more.shape, more.dtype, ()))
        if (before.shape, before.dtype) != (more.shape, more.dtype):
            raise ValueError(f"{' '.join(key)} has two shapes or types")
        index[key] = StoredTensor(more.shape, more.dtype, (*before.segments, *more.segments))
    return {key: _in_order(" ".join(key), stored) for key, stored in sorted(index.items())}


def as_rows(index: Index) -> list[dict[str, Any]]:
    """Plain values of an index; :func:`merge` makes it of them again."""
    return [
        {
            "kind": kind,
            "name": name,
            "shape": list(stored.shape),
            "dtype": _DTYPE_NAMES[stored.dtype],
            "segments": [[one.start, one.stop, one.file] for one in stored.segments],
        }
        for (kind, name), stored in index.items()
    ]


class PieceFiles:
    """The tensors of a checkpoint, see :class:`distmoe.parallel.shards.TensorSource`; opens files as they are needed.

    Args:
        folder: That holds them.
        index: Which of them holds what.
        rank: This one, for messages.
    """

    def __init__(self, folder: Path, index: Index, rank: int = 0) -> None:
        self._folder = folder
        self._rank = rank
        self._index = index
        self._names: dict[str, list[str]] = {}
        for kind, name in sorted(index):
            self._names.setdefault(kind, []).append(name)
        self._open: dict[str, Any] = {}

    def kinds(self) -> list[str]:
        """See the protocol."""
        return list(self._names)

    def names(self, kind: str) -> list[str]:
        """See the protocol."""
        return self._names.get(kind, [])

    def shape(self, kind: str, name: str) -> torch.Size:
        """See the protocol."""
        return self._index[kind, name].shape

    def dtype(self, kind: str, name: str) -> torch.dtype:
        """Of the tensor's elements; KeyError if there is none."""
        return self._index[kind, name].dtype

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """See the protocol."""
        stored, stop = self._index[kind, name], start + length
        if not 0 <= start <= stop <= stored.shape.numel():
            raise ValueError(f"{kind} {name} has no elements {start} to {stop}")
        values = torch.empty(length, dtype=stored.dtype)
        for one in stored.segments:
            first, last = max(start, one.start), min(stop, one.stop)
            if first < last:
                part = self._file(one.file).get_slice(_key(kind, name, one.start))
                values[first - start : last - start] = part[first - one.start : last - one.start]
        return values

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self._folder / name, framework="pt")
            except FileNotFoundError:
                raise unseen(self._folder, name, self._rank) from None
        return self._open[name]


class ModelTensors:
    """Weights and buffers of a checkpoint by name, see :class:`distmoe.moe.growing.TrainedTensors`.

    Args:
        files: Of the checkpoint.
        weights: Kind of the weights: as they were in training, or averaged.
    """

    def __init__(self, files: PieceFiles, weights: str) -> None:
        self._files = files
        self._kinds = {name: kind for kind in (weights, BUFFER) for name in files.names(kind)}

    def shapes(self) -> dict[str, torch.Size]:
        """See the protocol."""
        return {name: self._files.shape(kind, name) for name, kind in self._kinds.items()}

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor's elements."""
        return self._files.dtype(self._kinds[name], name)

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """See the protocol."""
        kind = self._kinds[name]
        shape = self._files.shape(kind, name)
        if rows is None:
            return self._files.read(kind, name, 0, shape.numel()).view(shape)
        row = shape[1:]
        values = self._files.read(kind, name, rows.start * row.numel(), len(rows) * row.numel())
        return values.view(len(rows), *row)


def _key(kind: str, name: str, start: int) -> str:
    return f"{kind}/{name}/{start}"


def _entry(piece: Piece) -> Entry:
    values = piece.values
    return Entry(_key(piece.kind, piece.name, piece.start), values.dtype, values.shape, lambda: values)


def _in_order(what: str, stored: StoredTensor) -> StoredTensor:
    segments = tuple(sorted(stored.segments, key=lambda one: (one.start, one.stop)))
    end = 0
    for one in segments:
        if one.start > end or one.stop < one.start:
            raise ValueError(f"{what} lacks elements {end} to {one.start}")
        if one.start < end:
            raise ValueError(f"{what} has elements {one.start} to {min(end, one.stop)} twice")
        end = one.stop
    if end != stored.shape.numel():
        raise ValueError(f"{what} has {end} of its {stored.shape.numel()} elements")
    return StoredTensor(stored.shape, stored.dtype, segments)
