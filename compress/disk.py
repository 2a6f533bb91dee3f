"""A full disk: seen before the work where that can be, and one sentence where it cannot."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.errors import ArtifactError, CompressError

_DISK_FULL = {errno.ENOSPC: "is full", errno.EDQUOT: "is full (quota)", errno.EFBIG: "takes no file so large"}


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """Raise ArtifactError when the disk under `folder` has less than `needed_bytes` free."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise ArtifactError(
            f"{folder}: the run needs {needed_bytes / 1e9:.2f} GB of disk and {free / 1e9:.2f} GB are free; free some "
            "space or pass -o on another disk"
        )


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the libraries raise when the disk is full into one sentence; everything else passes."""
    try:
        yield
    except CompressError:
        raise
    except Exception as e:
        what = _disk_full(e)
        if what is None:
            raise
        raise ArtifactError(f"{folder}: the disk {what}; free some space and run the same command again") from e


def _disk_full(error: BaseException | None) -> str | None:
    """What is wrong with the disk, if an error, or the one behind it, says that. safetensors gives text only."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return _DISK_FULL[error.errno]
        for code, what in _DISK_FULL.items():
            if f"os error {code}" in str(error) or os.strerror(code) in str(error):
                return what
        error = error.__cause__ or error.__context__
    return None
