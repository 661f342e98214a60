"""What is on the disk and what only on its way there."""

import os
from pathlib import Path


def flush(path: Path) -> None:
    """What is in the file or folder reaches the disk before anything after it does: renames survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
