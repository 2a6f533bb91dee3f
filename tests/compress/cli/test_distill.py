"""The command lines of `distill` and `teach`: defaults, what they print, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import calibration_data
from compress.checkpoint import Checkpoint
from compress.cli.main import main

TEXT = str(calibration_data.default_calibration())


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture
def student(build_model: object) -> Path:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    return build_model(**sizes)  # type: ignore[operator,no-any-return]


def test_trains_and_says_what_it_made(tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["distill", "--teacher", str(student), "--student", str(student), "--data", TEXT, "--tokens", "640"]
    sizes = ["--seq-len", "16", "--batch", "8", "--device", "cpu"]
    made = call(*asked, *sizes, "--report", "report")
    assert made.exit_code == 0, made.output
    assert "step 5/5: loss 0.0000" in made.output  # it is its own teacher
    assert "trained on 640 tokens in 5 updates" in made.output
    assert "wrote artifacts/model-distilled/" in made.output
    assert (tmp_path / "report" / "training.csv").read_text().startswith("step,tokens,loss")
    again = call(*asked, *sizes)
    assert again.exit_code == 1 and "exists already; pass --force" in again.output
    found = json.loads(call(*asked, *sizes, "--force", "--json").stdout)
    assert found["record"]["steps"] == 5 and found["out"] == "artifacts/model-distilled"


@pytest.mark.parametrize(("scheme", "format"), [("w4a16", "awq-gemm"), ("w8a8", "compressed-tensors")])
def test_codes_are_made_first_and_then_trained(
    tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, format: str
) -> None:
    """From a model that is not quantized to one that is, by one command: nearer to it than quantizing alone left it."""
    monkeypatch.chdir(tmp_path)
    asked = ["distill", "--teacher", str(student), "--scheme", scheme, "--data", TEXT, "--tokens", "5120"]
    sizes = ["--seq-len", "32", "--batch", "8", "--device", "cpu", "--lr", "1e-2"]
    # INT8 of random weights loses too little to be told from noise
    watch = ["--watch", TEXT, "--watch-tokens", "2048"] if scheme == "w4a16" else []
    made = call(*asked, *sizes, *watch, "--json")
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    record = found["record"]
    assert found["out"] == f"artifacts/model-{scheme}-distilled" and record["format"] == format
    if watch:
        looks = [look["divergence"] for look in record["watch"]["looks"]]
        assert record["kept_step"] > 0 and looks[-1] < looks[0]
    start, end = (Checkpoint.open(tmp_path / "artifacts" / f"model-{scheme}-{x}") for x in ("start", "distilled"))
    assert dict(start.config) == dict(end.config) and start.tensors.keys() == end.tensors.keys()
    for name in start.tensors:
        if name.rpartition(".")[2] in ("scales", "weight_scale"):
            assert not torch.equal(start.tensor(name), end.tensor(name)), name
    assert found["tensors_verified"] > len(end.tensors) - 1
    assert "is not quantized: `compress" in made.stderr
    if scheme == "w8a8":  # what was made first is used again, whatever the workspace has since, and only for its model
        again = call(*asked, *sizes, "--tokens", "1024", "-o", "again")
        assert again.exit_code == 0 and "is not quantized" not in again.output, again.output
        assert "student: artifacts/model-w8a8-start, made of" in again.output
        config = student / "config.json"
        config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
        other = call(*asked, *sizes, "-o", "other")
        assert other.exit_code == 1 and "artifacts/model-w8a8-start was made of another model" in other.output


def test_teaches_and_learns_from_it(
    tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch, valid_json: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ("teach", "--teacher", str(student), "--data", TEXT, "--tokens", "640", "--seq-len", "16")
    made = call(*asked)
    assert made.exit_code == 0, made.output
    assert "wrote artifacts/model-taught/  640 tokens, 44 bytes each" in made.output
    told = valid_json("teach", call(*asked, "-o", "other", "--json").stdout)
    assert (told["tokens"], told["token_bytes"]) == (640, 44)
    learned = call(
        "distill", "--teacher", str(student), "--student", str(student), "--cache", "artifacts/model-taught",
        "--tokens", "640", "--batch", "8", "-o", "out",
    )  # fmt: skip
    assert learned.exit_code == 0, learned.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", TEXT], "there is no pruned artifact in the workspace to train; pass --student MODEL"),
        (["--student", "S", "--data", TEXT], "has no manifest that names its original; pass --teacher MODEL"),
        (["--scheme", "w3a16", "--data", TEXT], "--scheme w3a16 is not one of w4a16, w8a16, w8a8"),
        (["--teacher", "S", "--scheme", "w8a8", "--lora", "4", "--data", TEXT], "leave out one"),
        (["--student", "S", "--teacher", "S"], "no text to learn on; pass --data FILE"),
        (["--student", "S", "--teacher", "S", "--data", TEXT, "--tensorboard"], "pass --report FOLDER as well"),
        (["--student", "S", "--teacher", "S", "--data", "none.txt"], "training file none.txt does not exist"),
    ],
)
def test_refusals(
    tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found = call("distill", *[str(student) if a == "S" else a for a in arguments])
    assert found.exit_code == 1
    assert message in found.output and found.output.strip().splitlines()[-1].startswith("error: ")


def test_without_text_nothing_is_taught(student: Path) -> None:
    found = call("teach", "--teacher", str(student))
    assert found.exit_code == 1 and "no text to teach; pass --data FILE" in found.output
