"""The description of prepared data, and the side-car file that keeps it beside the ``.beton`` files."""

import contextlib
import hashlib
import json
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from distmoe.contracts import DataSpec, SplitName
from distmoe.data.disk import flush

logger = logging.getLogger(__name__)

_HASH_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class PreparedSplit:
    """One split of prepared data.

    Attributes:
        path: The ``.beton`` file (of resident data: where it would be).
        num_samples: Number of samples.
        sample_shape: Shape of one stored sample; (H, W, C) for images.
        dtype: ``uint8`` or ``float32``.
        is_rgb: Whether ``image`` is an RGBImageField of H x W x 3 uint8; otherwise it is an NDArrayField.
        factor_fields: Factor name -> (field name, number of values a sample); float32 NDArrayFields.
    """

    path: Path
    num_samples: int
    sample_shape: tuple[int, ...]
    dtype: str
    is_rgb: bool
    factor_fields: dict[str, tuple[str, int]]


@dataclass(frozen=True)
class PreparedData:
    """Both splits, and what was computed from all samples when they were prepared.

    Attributes:
        spec: What models have to know.
        fingerprint: Hash of all samples, labels and factors; the same for prepared and resident data.
        splits: Training and test split.
    """

    spec: DataSpec
    fingerprint: str
    splits: dict[SplitName, PreparedSplit]


@dataclass(frozen=True)
class Original:
    """What the user's file was when it was prepared.

    Attributes:
        size: Bytes.
        modified_ns: Time of its last change.
        checksum: Of its content.
    """

    size: int
    modified_ns: int
    checksum: str

    @classmethod
    def of(cls, path: Path) -> "Original":
        """The present state of the file; OSError if it cannot be read."""
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, checksum(path))

    def still_is(self, path: Path) -> bool:
        """Whether the file has the same content; its content is read only if its size or time differ."""
        try:
            status = path.stat()
            same = (status.st_size, status.st_mtime_ns) == (self.size, self.modified_ns)
            return same or checksum(path) == self.checksum
        except OSError as error:
            logger.warning("%s cannot be read (%s): using what was prepared from it", path, error.strerror)
            return True


class SideCar(BaseModel):
    """What the side-car holds: the prepared data, the files' checksums and the user's original, if there is one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: DataSpec
    fingerprint: str
    splits: dict[SplitName, PreparedSplit]
    checksums: dict[SplitName, str]
    original: Original | None

    def prepared(self) -> PreparedData:
        """The description alone."""
        return PreparedData(self.spec, self.fingerprint, self.splits)


def checksum(path: Path) -> str:
    """BLAKE2b of a file's content; OSError if it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    buffer = memoryview(bytearray(_HASH_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def read_sidecar(path: Path) -> SideCar | None:
    """The side-car, with paths in its own folder; None where there is none, or, with a warning, a damaged one."""
    try:
        stored = json.loads(path.read_bytes())
        content = stored["content"]
        if stored["checksum"] != _checksum_of_text(content):
            raise ValueError("its checksum differs")
        sidecar = SideCar.model_validate_json(content)
        if set(sidecar.splits) != {"train", "test"} or set(sidecar.checksums) != {"train", "test"}:
            raise ValueError("a split is missing")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValidationError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        logger.warning("side-car %s is damaged (%s): preparing the data again", path, reason)
        return None
    splits = {name: replace(split, path=path.with_name(split.path.name)) for name, split in sidecar.splits.items()}
    return sidecar.model_copy(update={"splits": splits})


def write_sidecar(path: Path, sidecar: SideCar) -> None:
    """Writes the side-car so that it is there whole or not at all; OSError if it cannot be written."""
    content = sidecar.model_dump_json()
    text = json.dumps({"checksum": _checksum_of_text(content), "content": content})
    temporary = path.with_suffix(".json.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    flush(path.parent)


def _checksum_of_text(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
