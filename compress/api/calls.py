"""What every call of the Python API takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from compress.tell import Tell

if TYPE_CHECKING:
    from compress.workspace import Source

PathLike = str | os.PathLike[str]


def text_of(path: PathLike | None) -> str | None:
    """A path or data set as the stages name it."""
    return None if path is None else os.fspath(path)


def source_of(
    model: PathLike | None,
    out: PathLike | None,
    *,
    force: bool,
    trust: bool = False,
    adapter: PathLike | None = None,
    revision: str | None = None,
) -> Source:
    """The model to make something of; None as on the command line. An `out` that cannot be is refused first.

    adapter: a LoRA adapter of it, merged into a model of its own. revision: of a hub model.
    """
    from compress.adapter import merged
    from compress.workspace import WORKSPACE, is_model, resolve

    place = None if out is None else Path(out)
    source = resolve(
        text_of(model), quantizable=True, accept=is_model, out=place, force=force, revision=revision
    )  # fmt: skip
    return source if adapter is None else merged(source, Path(adapter), WORKSPACE, trust_remote_code=trust)


@contextmanager
def told(tell: Tell | None) -> Iterator[Tell]:
    """The listener asked for, or one that shows progress where the code runs."""
    if tell is not None:
        yield tell
        return
    from compress.cli.progress import Shown

    with Shown() as shown:
        yield shown
