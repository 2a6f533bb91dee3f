"""A full disk: seen before the work where that can be, and one sentence where it cannot."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.errors import ArtifactError, CompressError, out_of_room


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
def disk_errors() -> Iterator[None]:
    """Turn what the libraries raise when the disk is full into one sentence; everything else passes."""
    try:
        yield
    except CompressError:
        raise
    except Exception as e:
        full = full_disk(e)
        if full is None:
            raise
        raise full from e


def full_disk(error: BaseException | None) -> CompressError | None:
    """The sentence for a full disk (or memory), if an error, or one behind it, is about that."""
    while error is not None:
        full = out_of_room(error)
        if full is not None:
            return full
        error = error.__cause__ or error.__context__
    return None
