"""Which folder a command means: the newest artifact, whatever else lies there, and what is judged in whose place."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compress.artifact import Manifest, write_manifest
from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError
from compress.workspace import holds_weights, is_candidate, is_judgeable, is_model, judged_as, resolve


def artifact(folder: Path, record: dict[str, Any], *files: str, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    for name in files:
        if name.endswith(".safetensors"):
            save_file({"w": torch.full((2, 2), float(seed))}, folder / name)
        else:
            (folder / name).write_text(json.dumps({"seed": seed}))
    write_manifest(folder, Manifest(lineage=[{"parent": {"path": "../m", "sha256": ""}, **record}], reports=[]))
    return folder


def model(folder: Path, seed: int = 0) -> Path:
    return artifact(folder, {"stage": "awq"}, "config.json", "model.safetensors", seed=seed)


def an_export(folder: Path, parent: Path, form: str, *files: str) -> Path:
    where = {"path": os.path.relpath(parent, folder), "sha256": Checkpoint.open(parent).content_sha256()}
    return artifact(folder, {"stage": "export", "format": form, "parent": where}, *files)


def test_an_export_for_a_device_is_judged_by_the_artifact_whose_weights_it_holds(tmp_path: Path) -> None:
    """Also when that lies apart, being made for the export: it, and not the workspace's newest other artifact."""
    model(tmp_path / "model-awq")
    made = model(tmp_path / "for-export" / "model-sym", seed=1)
    export = an_export(tmp_path / "model-orin-edge", made, "edge", "build_engine.sh")
    newest = resolve(None, accept=is_candidate, workspace=tmp_path)
    assert newest.path == export
    judged = judged_as(newest)
    assert judged.path == made.resolve() and "runs on its device only" in judged.said
    assert judged_as(resolve(str(made))).path == made
    export.joinpath("model.onnx").write_bytes(b"")  # a graph that can be run is judged itself
    assert judged_as(resolve(str(export))).path == export
    export.joinpath("model.onnx").unlink()
    weights = (made / "model.safetensors").read_bytes()
    (made / "model.safetensors").write_bytes(weights[:-1] + b"\x40")
    with pytest.raises(ArtifactError, match="is not what .* was made from any more"):
        judged_as(newest)
    (made / "model.safetensors").write_bytes(weights)
    made.rename(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="is no longer there to be judged in its place; put it back"):
        judged_as(newest)


@pytest.mark.parametrize("form", ["onnx", "onnx-trt", "hf"])
def test_an_export_whose_graph_is_gone_is_refused_and_not_judged_by_its_parent(tmp_path: Path, form: str) -> None:
    made = model(tmp_path / "made")
    export = an_export(tmp_path / "export", made, form, "config.json", "model.onnx", "tokenizer.json")
    assert judged_as(resolve(str(export))).path == export
    (export / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match="model.onnx is gone, which compress.json lists"):
        judged_as(resolve(str(export)))
    value = json.loads((export / "compress.json").read_text())  # the same, made by an older version
    del value["sha256"], value["lineage"][0]["files"]
    (export / "compress.json").write_text(json.dumps(value))
    with pytest.raises(ArtifactError, match="what runs of this .* export is gone"):
        judged_as(resolve(str(export)))


def test_the_newest_is_the_one_published_last_and_reading_changes_nothing(tmp_path: Path) -> None:
    for number, name in enumerate(("b", "a", "c")):
        model(tmp_path / name)
        os.utime(tmp_path / name / "compress.json", ns=(10**18 + number, 10**18 + number))
    assert resolve(None, accept=is_model, workspace=tmp_path).path.name == "c"
    (tmp_path / "a.reports").mkdir()
    (tmp_path / "a.reports" / "0123.json").write_text("{}")
    assert resolve(None, accept=is_model, workspace=tmp_path).path.name == "c"
    os.utime(tmp_path / "a" / "compress.json", ns=(10**18 + 2, 10**18 + 2))  # at the same moment: the last by name
    assert resolve(None, accept=is_model, workspace=tmp_path).path.name == "c"


FOREIGN: list[Any] = [
    "", "not JSON", "[]", "null", "{}", '{"schema": 7}', '{"schema": 1, "lineage": []}',
    '{"schema": 1, "lineage": [3]}', '{"schema": 1, "lineage": [{"stage": "awq"}]}',
    '{"schema": 1, "lineage": [{"stage": 1, "parent": {}}]}', b"\xff\xfe\x00", "1" * 10_000, "[" * 100_000,
    '{"name": "a web project that compresses pictures", "quality": 80}',
]  # fmt: skip


@pytest.mark.parametrize("content", FOREIGN, ids=range(len(FOREIGN)))
@pytest.mark.parametrize("accept", [holds_weights, is_model, is_judgeable, is_candidate])
def test_a_foreign_manifest_is_passed_over_and_named(tmp_path: Path, content: Any, accept: Any) -> None:
    mine = model(tmp_path / "mine")
    foreign = model(tmp_path / "foreign")
    (foreign / "compress.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    os.utime(foreign / "compress.json", ns=(2**62, 2**62))
    found = resolve(None, accept=accept, workspace=tmp_path)
    assert found.path == mine and f"note: {foreign} was passed over: " in found.said


def test_what_is_no_artifact_at_all_does_not_stop_anything(tmp_path: Path) -> None:
    mine = model(tmp_path / "mine")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "folder" / "compress.json").mkdir(parents=True)
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "compress.json").symlink_to("nowhere")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "compress.json")
    shutil.copytree(mine, tmp_path / ".mine.0123abcd.old")
    shutil.copytree(mine, tmp_path / ".mine.0123abcd.partial")
    found = resolve(None, accept=is_model, workspace=tmp_path)
    assert found.path == mine and "note" not in found.said


def test_what_was_made_from_the_bundled_model_has_its_text(tmp_path: Path, reference_model: Path) -> None:
    """By the manifest's root, whether that is bundled or a copy of it that lies elsewhere, or is gone."""
    content = Checkpoint.open(reference_model).content_sha256()
    root = {"bundled": {"path": "bundled:reference_lm", "sha256": ""}, "copy": {"path": "../gone", "sha256": content}}
    for name, parent in root.items():
        made = artifact(tmp_path / name, {"stage": "prune", "parent": parent}, "config.json", "model.safetensors")
        assert resolve(str(made)).is_reference
        assert resolve(None, workspace=tmp_path).is_reference
    assert resolve(str(reference_model)).is_reference
    assert not resolve(str(model(tmp_path / "other"))).is_reference
    assert not resolve(None, workspace=tmp_path).is_reference
