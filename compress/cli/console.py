"""rich's console, as every command uses it: see `compress.cli.terminal`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import rich.console
from rich.segment import Segment

from compress.cli.terminal import printable


class Console(rich.console.Console):
    """rich's console, whose strings are text and not markup, and whose own control codes are the only ones."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        return super()._render_buffer(
            part if part.control else Segment(printable(part.text), part.style) for part in buffer
        )
