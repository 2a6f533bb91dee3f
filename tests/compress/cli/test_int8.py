"""`compress int8` as a user types it."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from compress.cli.main import main


def run(*words: object) -> Any:
    return CliRunner().invoke(main, ["int8", *(str(word) for word in words)])


def test_a_run_and_its_summary(build_model: Any, calib_text: Path, tmp_path: Path) -> None:
    folder, out = build_model(), tmp_path / "out"
    common = ["--calib", calib_text, "--samples", 4, "--seq-len", 64, "--effort", "fast", "--device", "cpu"]
    done = run(folder, "-o", out, "--kv-cache", "int8", "--keep-inputs", 1, *common)
    assert done.exit_code == 0, done.output
    assert "worst layers of " in done.output and "INT8 KV cache, error of the worst block" in done.output
    assert "inputs stay floats in 1 of 8 groups of layers: model.layers." in done.output
    assert "w8a8-keep1-kv8, 14 layers; left as it is: lm_head" in done.output
    as_json = run(folder, "-o", tmp_path / "json", "--json", "--scheme", "w8a16", *common)
    value = json.loads(as_json.stdout)
    assert value["record"]["options"]["scheme"] == "w8a16" and value["tensors_verified"] > 14 * 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--smoothing", "much"], "'much' is neither `auto` nor a number from 0 to 1"),
        (["--keep-inputs", "most"], "'most' is neither `auto` nor a number of groups"),
        (["--group-size", 64], "--scheme w8a8 has one scale a row"),
        (["--scheme", "w8a16", "--static"], "--static is about inputs"),
    ],
)
def test_bad_options_need_no_model_to_be_refused(words: list[object], message: str, tmp_path: Path) -> None:
    done = run(tmp_path / "nothing-here", *words)
    assert done.exit_code != 0
    assert message in done.output + str(done.exception)
