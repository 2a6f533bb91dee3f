"""What a model says of itself reaches the terminal as text: no control character, no markup, no text turned round.

Names of files, layers and tokens come from folders that anybody may have made. They are printed in many places, so what
makes them harmless lies below all of these: `plain_streams` for `print`, and `compress.cli.console` for rich.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

# Characters that turn the direction of what follows.
_TURNING = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}


def printable(text: str, keep: str = "\n\t") -> str:
    """The text with control characters (but those in `keep`) and turning marks written as `\\u001b`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or not _is_harmful(c) else f"\\u{ord(c):04x}" for c in text)


def _is_harmful(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or ord(character) in _TURNING


class _Plain:
    """A text stream that writes what is printable; anything else about it is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.rich_proxied_file = stream  # rich looks for it: what it writes is escaped below, codes of its own are not

    def write(self, text: str) -> int:
        self.stream.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def plain_streams() -> Iterator[None]:
    """While the context lasts, what is printed to stdout and stderr is `printable`."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = cast(TextIO, _Plain(before[0])), cast(TextIO, _Plain(before[1]))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
