"""Whether a checkpoint is whole: checksums, what is damage and what is not, and what has reached the disk."""

import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from distmoe.contracts import UserError


class DamagedCheckpointError(UserError):
    """A checkpoint is not whole: nothing of it can be trusted."""


def unseen(folder: Path, what: str, rank: int) -> UserError:
    """The error of a rank that does not see what another one sees: no damage, and nothing to be renamed for."""
    return UserError(
        f"checkpoint {folder}: rank {rank} on host {platform.node()} does not see {what}: run.dir must be on storage "
        "that all hosts share"
    )


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Around what rank 0 reads: what is not there or not as it should be is damage; what may not be read is not."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        name = Path(error.filename or "").name or "it"
        raise DamagedCheckpointError(f"checkpoint {folder}: {name} is missing; use another") from None
    except OSError as error:
        raise UserError(f"checkpoint {folder}: cannot be read ({error}); mend that, or use another") from None
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise DamagedCheckpointError(f"checkpoint {folder}: cannot be read ({error}); use another") from None


def read_checksums(folder: Path) -> dict[str, str]:
    """The checksums of a checkpoint's files, by name.

    Raises:
        DamagedCheckpointError: They are damaged themselves.
        OSError: They cannot be read.
    """
    try:
        checksums = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))
        if not isinstance(checksums, dict):
            raise ValueError("it is no table")
    except ValueError as error:  # of what is no UTF-8 or no JSON, too
        raise DamagedCheckpointError(f"checkpoint {folder}: checksums.json is damaged ({error}); use another") from None
    return checksums


def verify(folder: Path, checksums: Mapping[str, str], names: Iterable[str], rank: int = 0) -> None:
    """Compares files with their checksums.

    Raises:
        DamagedCheckpointError: One differs, or is missing on rank 0.
        UserError: One may not be read, or is missing on another rank, while rank 0 has seen it.
    """
    with reading(folder):
        for name in sorted(names):
            if name not in checksums:
                raise DamagedCheckpointError(f"checkpoint {folder}: checksums.json lacks {name}; use another")
            try:
                found = checksum_of(folder / name)
            except (FileNotFoundError, NotADirectoryError):
                if rank == 0:
                    raise
                raise unseen(folder, name, rank) from None
            if found != checksums[name]:
                raise DamagedCheckpointError(f"checkpoint {folder}: {name} is damaged (checksum differs); use another")


def checksum_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
