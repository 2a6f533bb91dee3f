"""TensorRT's measured kernel times, kept in the user's cache from one build to the next for the same kind of card.

They make a second build quick, and equal: the same kernels are chosen. TensorRT itself refuses times of another version
or card, and measures again. TensorRT-RTX compiles without measuring and has none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from compress.files import write_bytes_atomically

TIMING = "model.timing"


def kept_file(sm: str, environ: Mapping[str, str] = os.environ) -> Path:
    """Where the times of a card of this compute capability are kept."""
    root = environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "compress" / f"tensorrt-sm{sm}.timing"


def lend(folder: Path, kept: Path) -> None:
    """Put the kept times where the build looks for them."""
    if kept.is_file():
        write_bytes_atomically(folder / TIMING, kept.read_bytes())


def keep(folder: Path, kept: Path) -> str | None:
    """Keep what the build measured; the reason where that cannot be."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(kept, (folder / TIMING).read_bytes())
    except OSError as e:
        return f"TensorRT's kernel times were not kept for the next build: {kept}: {e.strerror}"
    return None
