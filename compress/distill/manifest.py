"""What the manifests of this stage say of models and versions."""

from __future__ import annotations

import os
from pathlib import Path

import torch

import compress
from compress import distributed
from compress.artifact import BUNDLED, check_files
from compress.checkpoint import Checkpoint, content_of
from compress.workspace import Source


def content(source: Source) -> str:
    """Hash of a model's config and weights, the same in every process.

    Its files are compared with its manifest, if it has one: ArtifactError names one that was changed.
    """
    found: str = distributed.told_by_first(
        lambda: content_of(check_files(source.path).hashes, Checkpoint.open(source.path).content_files())
    )
    return found


def named(path: Path, out: Path) -> str:
    """How a manifest in `out` names a model: bundled, or relative to itself so that a workspace can move."""
    import calibration_data

    if path.resolve() == calibration_data.reference_model().resolve():
        return BUNDLED
    return os.path.relpath(path.resolve(), out.resolve())


def versions() -> dict[str, str]:
    """Versions of what decides the bytes."""
    import accelerate
    import numpy
    import transformers

    return {
        "compress": compress.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "numpy": numpy.__version__,
    }
