"""Commands that a message tells the user to type: quoted, so that they run when copied."""

from __future__ import annotations

import shlex


def command(*words: object) -> str:
    """`compress awq 'my model' --group-size 64`, from its words."""
    return shlex.join(["compress", *(str(word) for word in words)])
