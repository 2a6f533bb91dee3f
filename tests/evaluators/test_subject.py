"""Whose weights a verdict is about: an export's codes need not be those of the artifact that it was made from."""

import json
from pathlib import Path
from typing import Any

import pytest

from compress.artifact import Manifest, write_manifest
from evaluators.subject import whose_weights


def an_export(folder: Path, form: str, **record: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({}))
    stated = {
        "stage": "export",
        "format": form,
        "target": "orin",
        "parent": {"path": "../made", "sha256": "0"},
        **record,
    }
    write_manifest(folder, Manifest(lineage=[stated], reports=[]))
    return folder


def test_a_model_is_judged_by_its_own_weights(tmp_path: Path) -> None:
    assert whose_weights(tmp_path) == f"the weights of {tmp_path}"


@pytest.mark.parametrize("again", [False, True])
def test_an_export_that_runs_here_and_one_that_does_not(tmp_path: Path, again: bool) -> None:
    record = {"requantized_from": "../named" if again else None}
    made = tmp_path / "made"
    runs = an_export(tmp_path / "runs", "onnx-trt", **record)
    engine = an_export(tmp_path / "engine", "edge", **record)
    tail = f": quantized again for orin, not the codes of {tmp_path / 'named'}" if again else ""
    assert whose_weights(runs, runs) == f"the export's own, as its onnx-trt files hold them, made of {made}{tail}"
    assert (
        whose_weights(made, engine)
        == f"the weights of {made}, which {engine} holds (its edge runs on its device only){tail}"
    )


def test_an_export_of_the_bundled_model(tmp_path: Path) -> None:
    export = an_export(
        tmp_path / "out", "hf", requantized_from=None, parent={"path": "bundled:reference_lm", "sha256": "0"}
    )
    assert whose_weights(export).endswith("made of bundled:reference_lm")
