"""The commands that follow a stage, as they are typed next."""

from __future__ import annotations

from pathlib import Path

from compress import advice

# Tokens of a window where `compress evaluate` is not told.
EVALUATED_CONTEXT = 512


def judge(out: Path, *options: object, context: int | None = None) -> str:
    """`compress evaluate OUT`: on text that fits its model, in windows that it has positions for.

    The bundled text fits the bundled model only, so others are judged on text of their own. context: tokens that an
    export's caches hold.
    """
    from compress.positions import positions_of
    from compress.workspace import from_reference

    words: list[object] = ["evaluate", out, *options]
    words += [] if from_reference(out) else ["--data", "self"]
    limit = positions_of(out)
    most = min(EVALUATED_CONTEXT, context or EVALUATED_CONTEXT, limit[1] if limit else EVALUATED_CONTEXT)
    words += ["--context", most] if most < EVALUATED_CONTEXT else []
    return advice.command(*words)
