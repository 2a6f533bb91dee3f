"""`compress status`, `log` and `gc`: what they say of a workspace, and what is never removed."""

import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from compress.artifact import Manifest, write_manifest
from compress.cli.main import main
from compress.files import file_sha256, json_bytes
from compress.lock import locked
from compress.output import reserved


@pytest.fixture
def compress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> Result:
        return CliRunner().invoke(main, [str(a) for a in args], catch_exceptions=False)

    return run


def artifact(name: str, stage: str, parent: str, time: int, **record: Any) -> Path:
    folder = Path("artifacts", name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(1_000_000))
    told = {"stage": stage, "parent": {"path": parent, "sha256": ""}, **record}
    write_manifest(folder, Manifest(lineage=[told], reports=[]))
    os.utime(folder / "compress.json", (time, time))
    return folder


@pytest.fixture
def workspace(compress: Any) -> None:
    """bundled -> m-prune -> m-awq -> m-orin (through for-export/m-awq-sym), and m-int8 beside it, judged."""
    artifact("m-prune", "prune", "bundled:reference_lm", 1, parameters={"before": 4e6, "after": 3e6})
    scheme = {"num_bits": 4, "group_size": 128, "symmetric": False}
    artifact("m-awq", "awq", "../m-prune", 2, options={"scheme": scheme, "effort": "fast"})
    artifact("for-export/m-awq-sym", "awq", "../../m-prune", 3, options={"scheme": {**scheme, "symmetric": True}})
    artifact("for-export/old-sym", "awq", "../../gone", 4)
    artifact("m-orin", "export", "../for-export/m-awq-sym", 5, target="orin", format="edge")
    judged = artifact("m-int8", "int8", "bundled:reference_lm", 6, options={"scheme": "w8a8"})
    brief = {
        "kind": "evaluation", "artifact": file_sha256(judged / "compress.json"), "reference_sha256": "", "text": {},
        "metrics": {"perplexity_recovery": 0.9971, "kl_mean": 0.0021}, "outcome": "PASS", "gate": {"threshold": 0.98},
    }  # fmt: skip
    for name in ("m-int8", "forgotten"):
        Path(f"artifacts/{name}.reports").mkdir()
        Path(f"artifacts/{name}.reports/1.json").write_bytes(json_bytes(brief))
    with reserved(Path("artifacts/m-killed"), {}, force=False) as place:
        place.start({"stage": "awq"}, resume=True)


def test_an_empty_workspace_says_how_to_fill_it(compress: Any) -> None:
    for name in ("status", "log"):
        assert "holds no artifact yet; `compress awq`" in compress(name).stdout
    assert compress("gc", "--yes").stdout == "0 removed, 0.0 MB\n"


def test_what_there_is(compress: Any, workspace: None, valid_json: Any) -> None:
    shown = compress("status").stdout
    assert "99.71%" in shown and "PASS at 98.0%" in shown and "w4g128 fast" in shown and "orin edge" in shown
    assert "6 artifacts" in shown and "3 leftovers" in shown
    told = valid_json("status", compress("status", "--json").stdout)
    assert [a["path"] for a in told["artifacts"]][-1] == "m-int8", "the newest last"
    assert {c["path"] for c in told["could_go"]} == {
        "artifacts/for-export/old-sym", "artifacts/forgotten.reports",
        next(str(p) for p in Path("artifacts").glob(".m-killed.*.partial")),
    }  # fmt: skip
    lines = compress("log").stdout.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "bundled:reference_lm",
        "├─ m-prune",
        "│",
        "│",
        "│",
        "└─ m-int8",
        next(line for line in lines if line.endswith("gone (gone)")),
        "└─ for-export/old-sym",
    ]
    assert "│  ├─ m-awq  awq, w4g128 fast, 1.0 MB" in lines[2] and lines[4].startswith("│     └─ m-orin  export")
    roots = valid_json("log", compress("log", "--json").stdout)["roots"]
    assert [c["path"] for c in roots[0]["children"]] == ["m-awq", "for-export/m-awq-sym"]


def test_gc_touches_nothing_without_yes_and_only_what_nothing_needs_with_it(
    compress: Any, workspace: None, valid_json: Any
) -> None:
    before = sorted(map(str, Path("artifacts").rglob("*")))
    assert len(valid_json("gc", compress("gc", "--json").stdout)["could_go"]) == 3
    assert "3 could go" in compress("gc").stdout and sorted(map(str, Path("artifacts").rglob("*"))) == before
    Path("artifacts/for-export/old-sym/notes.txt").write_text("mine")
    told = compress("gc", "--yes").stdout
    assert "2 removed" in told and "notes.txt, which no run made" in told
    left = {p.name for p in Path("artifacts").iterdir()}
    assert left == {"m-prune", "m-awq", "m-orin", "m-int8", "m-int8.reports", "for-export"}
    assert Path("artifacts/for-export/old-sym/notes.txt").exists() and Path("artifacts/for-export/m-awq-sym").exists()


def test_an_artifact_goes_only_when_nothing_needs_it(compress: Any, workspace: None) -> None:
    refused = compress("gc", "artifacts/m-prune", "--yes")
    assert refused.exit_code == 1 and "is needed: artifacts/m-awq was made from it" in refused.stderr
    assert "is the newest artifact" in compress("gc", "artifacts/m-int8", "--yes").stderr
    assert "is no artifact of the workspace" in compress("gc", "artifacts", "--yes").stderr
    assert "1 could go" in compress("gc", "artifacts/m-awq").stdout and Path("artifacts/m-awq").exists()
    assert "1 removed" in compress("gc", "artifacts/m-awq", "--yes").stdout and not Path("artifacts/m-awq").exists()


def test_a_run_that_still_works_keeps_its_scratch(compress: Any, workspace: None) -> None:
    scratch = next(Path("artifacts").glob(".m-killed.*.partial"))
    with locked(Path("artifacts/.m-killed.compress-lock"), "artifacts/m-killed"):
        told = compress("gc", "--yes").stdout
    assert scratch.exists() and "is being written by process" in told


def test_no_folder_of_a_stranger_is_a_leftover(compress: Any, workspace: None) -> None:
    strange = Path("artifacts/.mine.0123abcd.partial")
    strange.mkdir()
    (strange / "thesis.txt").write_text("")
    old = Path("artifacts/.mine.0123abcd.old")
    old.mkdir()
    compress("gc", "--yes")
    assert (strange / "thesis.txt").exists() and old.exists()
