"""Evaluations beside the artifacts that they are about: kept, found again, and never taken for another's."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from compress.artifact import Manifest, write_manifest
from compress.errors import ConfigError
from evaluators import memory
from evaluators.results import Metric, Report, Subject
from evaluators.written import refuse_strangers, write_reports

COUNTS = ("num_tokens", "num_windows", "num_bytes", "context", "stride", "min_context", "bos")


def subject(path: Path, sha256: str) -> Subject:
    return Subject(
        path=str(path), sha256=sha256, format="awq", runtime="torch", weight_bytes=1, num_parameters=1,
        bits_per_weight=4.0,
    )  # fmt: skip


def report(artifact: Path, outcome: Any = "PASS", threshold: float = 0.98, text: str = "t") -> Report:
    return Report(
        candidate=subject(artifact, "c"),
        reference=subject(artifact.parent / "original", "r"),
        text={**dict.fromkeys(COUNTS, 1), "source": "anywhere", "text_sha256": text},
        metrics=[Metric(name="perplexity", unit="", better="lower", value=8.0, n=1, counted="windows")],
        verdicts=[],
        gate={"threshold": threshold, "confidence": 0.95, "rule": "bounds", "metrics": []},
        outcome=outcome,
        blocks=[],
        internals=[],
        kl_histogram=None,
        notes=[],
        versions={},
    )


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "workspace" / "q"
    folder.mkdir(parents=True)
    record = {"stage": "awq", "parent": {"path": "../m", "sha256": "r"}}
    write_manifest(folder, Manifest(lineage=[record], reports=[]))
    return folder


def remake(artifact: Path, option: int) -> None:
    record = {"stage": "awq", "parent": {"path": "../m", "sha256": "r"}, "options": {"option": option}}
    write_manifest(artifact, Manifest(lineage=[record], reports=[]))


def test_one_for_each_text_and_gate_and_the_last_one_counts(artifact: Path) -> None:
    for one in (
        report(artifact, "FAIL"),
        report(artifact),
        report(artifact, text="u"),
        report(artifact, threshold=0.9),
    ):
        assert memory.remember(artifact, one) is None
    kept = memory.recalled(artifact)
    assert sorted((r["text"]["text_sha256"], r["gate"]["threshold"], r["outcome"]) for r in kept) == [
        ("t", 0.9, "PASS"), ("t", 0.98, "PASS"), ("u", 0.98, "PASS"),
    ]  # fmt: skip


def test_a_successor_of_the_same_name_does_not_inherit(artifact: Path) -> None:
    memory.remember(artifact, report(artifact))
    remake(artifact, 1)
    assert memory.recalled(artifact) == []
    memory.remember(artifact, report(artifact, "FAIL"))
    assert [r["outcome"] for r in memory.recalled(artifact)] == ["FAIL"]


def test_older_versions_kept_them_in_the_manifest(artifact: Path) -> None:
    value = json.loads((artifact / "compress.json").read_text())
    del value["sha256"], value["lineage"][0]["files"]
    value["reports"] = [{"kind": "evaluation", "outcome": "PASS"}]
    (artifact / "compress.json").write_text(json.dumps(value))
    assert memory.recalled(artifact) == value["reports"]


def test_what_is_not_ours_is_neither_read_nor_written_over(artifact: Path) -> None:
    memory.remember(artifact, report(artifact))
    folder = memory.reports_folder(artifact)
    (path,) = folder.iterdir()
    for content in ("", "[]", "{}", '{"kind": "evaluation"}', '{"kind": "evaluation", "text": 3, "metrics": {}}'):
        path.write_text(content)
        (folder / "notes.json").write_text(content)
        assert memory.recalled(artifact) == []
        said = memory.remember(artifact, report(artifact))
        assert said is not None and "is in the way" in said and path.read_text() == content
    os.mkfifo(folder / "pipe.json")
    assert memory.recalled(artifact) == []
    shutil.rmtree(folder)
    folder.write_text("a file of the user's")
    said = memory.remember(artifact, report(artifact))
    assert said is not None and "was not kept" in said and folder.read_text() == "a file of the user's"


def test_a_neighbour_that_cannot_be_read_is_named_and_left_out(artifact: Path) -> None:
    memory.remember(artifact, report(artifact))
    foreign = artifact.parent / "foreign"
    foreign.mkdir()
    (foreign / "compress.json").write_text("{}")
    shutil.copytree(artifact, artifact.parent / ".q.0123abcd.old")
    found, notes = memory.others(report(artifact.parent / "another"), artifact.parent)
    assert [o["path"] for o in found] == ["q"]
    assert len(notes) == 1 and notes[0].startswith(f"{foreign} was left out: ")


def test_reports_are_written_over_reports_only(artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reports"
    files, _ = write_reports(report(artifact), folder)
    write_reports(report(artifact, "FAIL"), folder)
    assert '"outcome": "FAIL"' in (folder / "report.json").read_text()
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(b"the user's own")
        for refused in (lambda: refuse_strangers(folder), lambda: write_reports(report(artifact), folder)):
            with pytest.raises(ConfigError, match=f"{path.name} is there and is not a report of ours"):
                refused()
        assert path.read_bytes() == b"the user's own"
        path.unlink()
        path.symlink_to("nowhere")
        with pytest.raises(ConfigError, match="is there and is not a report of ours"):
            refuse_strangers(folder)
        path.unlink()
        path.write_bytes(whole)
    refuse_strangers(folder)
