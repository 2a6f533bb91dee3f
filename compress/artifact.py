"""An artifact: a model folder with `compress.json`, the manifest that says how it was made and from what.

The manifest holds no dates, durations or host names, so that the same run gives the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import ArtifactError
from compress.files import json_bytes, read_json, write_bytes_atomically

MANIFEST = "compress.json"
SCHEMA = 1
BUNDLED = "bundled:reference_lm"

# Files of a model folder that are not weights and belong to it wherever it goes. README.md is not among them: it
# describes the original.
CARRIED = (
    "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "spiece.model", "sentencepiece*", "chat_template*", "preprocessor_config.json", "processor_config.json",
    "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `compress.json` says. `lineage[0]` is the stage that made this artifact, the last its oldest ancestor's.

    Each record holds: stage, options, parent {path, sha256}, calibration, versions, layers, groups.
    """

    lineage: list[dict[str, Any]]
    reports: list[dict[str, Any]]

    @property
    def record(self) -> dict[str, Any]:
        """The stage that made this artifact."""
        return self.lineage[0]

    @property
    def root(self) -> Mapping[str, Any]:
        """Path and content hash of the oldest ancestor: the original model."""
        parent: Mapping[str, Any] = self.lineage[-1]["parent"]
        return parent

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "lineage": self.lineage, "reports": self.reports}


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, or None if no stage of ours made it."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    value = read_json(path)
    if value.get("schema") != SCHEMA or not value.get("lineage"):
        raise ArtifactError(
            f"{path}: manifest schema {value.get('schema')!r} is not {SCHEMA}; it was written by another version"
        )
    return Manifest(lineage=value["lineage"], reports=value.get("reports", []))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_bytes_atomically(folder / MANIFEST, json_bytes(manifest.to_json()))


def add_report(folder: Path, report: dict[str, Any]) -> None:
    """Append a report (evaluation, verdict) to the folder's manifest; a folder without one is left alone."""
    manifest = read_manifest(folder)
    if manifest is not None:
        write_manifest(folder, Manifest(lineage=manifest.lineage, reports=[*manifest.reports, report]))


def parent_path(parent: Mapping[str, Any], folder: Path) -> Path:
    """Where a manifest's parent lies: bundled, relative to the artifact's folder, or absolute.

    Raises ArtifactError, with the way out, when it is gone.
    """
    if parent["path"] == BUNDLED:
        import calibration_data

        return calibration_data.reference_model()
    path = Path(folder, str(parent["path"])).resolve()
    if not path.is_dir():
        raise ArtifactError(
            f"{folder}: its parent {parent['path']} is no longer there; pass the original model explicitly"
        )
    return path


def rebased(lineage: Sequence[Mapping[str, Any]], old: Path, new: Path) -> list[dict[str, Any]]:
    """A lineage copied from the manifest in `old` to one in `new`: paths are relative to the manifest's own folder."""

    def moved(parent: Mapping[str, Any]) -> dict[str, Any]:
        path = str(parent["path"])
        if path == BUNDLED or Path(path).is_absolute():
            return dict(parent)
        return {**parent, "path": os.path.relpath(Path(old, path).resolve(), new.resolve())}

    return [{**record, "parent": moved(record["parent"])} for record in lineage]


def carried_files(folder: Path) -> list[Path]:
    """The files that accompany the weights, sorted by name."""
    return sorted({p for pattern in CARRIED for p in folder.glob(pattern) if p.is_file()})
