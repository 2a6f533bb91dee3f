"""`compress bench` as a user types it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from compress.cli.main import main

SHORT = ("--prompt-len", "8", "--new-tokens", "4", "--rounds", "5")


def test_a_folder_against_itself(reference_model: Path, tmp_path: Path, valid_json: Any) -> None:
    out, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    args = ["bench", str(reference_model), str(reference_model), *SHORT, "-o", str(out), "--plot", str(plot)]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 0, done.output
    found = valid_json("bench", out.read_text())
    assert [r["completed"] for r in found["results"]] == [5, 5] and plot.stat().st_size > 1000
    ratio = found["results"][1]["against_first"]
    assert ratio["low"] < ratio["ratio"] < ratio["high"]
    assert "tokens/s" in done.stdout and "graph" not in done.stdout, "no graph ran, so none is spoken of"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--graphs", "maybe"), "--graphs maybe: pass on, off"),
        (("-o", "nowhere/at/all.json"), "does not exist; make it"),
        (("--prompt-len", "100000"), "the model was made for"),
    ],
)
def test_mistakes_are_one_sentence(reference_model: Path, extra: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(main, ["bench", str(reference_model), *SHORT, *extra])
    assert done.exit_code == 1 and message in done.stderr
