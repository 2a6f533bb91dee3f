"""What the manifests of this stage say of models and versions."""

from __future__ import annotations

from compress import distributed, stage
from compress.checkpoint import Checkpoint
from compress.contents import check_files
from compress.workspace import Source


def content(source: Source) -> str:
    """Hash of a model's config and weights, the same in every process.

    Its files are compared with its manifest, if it has one: ArtifactError names one that was changed.
    """
    found: str = distributed.told_by_first(
        lambda: check_files(source.path).content_sha256(Checkpoint.open(source.path))
    )
    return found


def versions() -> dict[str, str]:
    """Versions of what decides the bytes."""
    import accelerate

    return {**stage.versions(), "accelerate": accelerate.__version__}
