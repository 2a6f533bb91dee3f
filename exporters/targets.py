"""The machines that an artifact is sized for, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Target:
    """A machine. memory_bytes: what it has; usable: the share that a model may take."""

    name: str
    memory_bytes: int
    usable: float
