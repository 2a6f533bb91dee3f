"""Which artifact a command means when the newest one cannot be run here."""

import json
from pathlib import Path

import pytest

from compress.artifact import Manifest, write_manifest
from compress.errors import ArtifactError
from compress.workspace import is_candidate, judged_as, resolve


def artifact(folder: Path, record: dict[str, object], *files: str) -> Path:
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_text(json.dumps({}))
    write_manifest(folder, Manifest(lineage=[record], reports=[]))  # type: ignore[list-item]
    return folder


def test_an_export_for_a_device_is_judged_by_the_artifact_whose_weights_it_holds(tmp_path: Path) -> None:
    """Also when that lies apart, being made for the export: it, and not the workspace's newest other artifact."""
    artifact(tmp_path / "model-awq", {"stage": "awq"}, "config.json", "model.safetensors")
    made = artifact(tmp_path / "for-export" / "model-sym", {"stage": "awq"}, "config.json", "model.safetensors")
    record = {"stage": "export", "format": "edge", "parent": {"path": "../for-export/model-sym", "sha256": ""}}
    export = artifact(tmp_path / "model-orin-edge", record, "build_engine.sh")
    newest = resolve(None, accept=is_candidate, workspace=tmp_path)
    assert newest.path == export
    judged = judged_as(newest)
    assert judged.path == made.resolve() and "runs on its device only" in judged.said
    assert judged_as(resolve(str(made))).path == made
    export.joinpath("model.onnx").write_bytes(b"")  # a graph that can be run is judged itself
    assert judged_as(resolve(str(export))).path == export
    export.joinpath("model.onnx").unlink()
    made.rename(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="is no longer there"):
        judged_as(newest)
