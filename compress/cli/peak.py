"""How much memory this process took at most."""

from __future__ import annotations

import resource
import sys


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far (`ru_maxrss`; kibibytes on Linux, bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
