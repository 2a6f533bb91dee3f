"""The group size that is taken when none is asked for, and what is said before any work."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from compress.artifact import read_manifest
from compress.cli.main import main
from compress.errors import UnsupportedError
from compress.model import StreamedModel
from compress.quantize.group_size import chosen_group_size


def outline(folder: Path, **changes: Any) -> StreamedModel:
    """Of a config.json alone, so that wide models cost nothing."""
    from transformers import LlamaConfig

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 128, "vocab_size": 512}
    LlamaConfig(**{**sizes, "intermediate_size": 1536, **changes}).save_pretrained(folder)
    return StreamedModel.outline(folder)


@pytest.mark.parametrize(
    ("hidden", "size", "said"),
    [
        (4096, 128, ""),
        (1152, 128, ""),
        (640, 128, ""),
        (576, 64, "64, the largest of 128, 64 and 32 that divides every layer's inputs (128 does not divide the 576"),
        (2880, 64, "128 does not divide the 2880 of model.layers.0.self_attn.q_proj)"),
        (608, 32, "128 does not divide the 608"),
    ],
)
def test_the_largest_that_divides_every_layer(hidden: int, size: int, said: str, tmp_path: Path) -> None:
    found, line = chosen_group_size(outline(tmp_path, hidden_size=hidden))
    assert found == size and said in line and bool(line) == bool(said)


def test_a_layer_that_none_divides_is_named_and_can_be_skipped(tmp_path: Path) -> None:
    model = outline(tmp_path, hidden_size=1024, intermediate_size=1000)
    with pytest.raises(UnsupportedError, match=r"^model.layers.0.mlp.down_proj has 1000 inputs.*--skip model.layers.0"):
        chosen_group_size(model)
    assert chosen_group_size(model, ["*.down_proj"]) == (128, "")


@pytest.fixture
def run_awq(tmp_path: Path, calib_text: Path, build_model: Any) -> Any:
    model = build_model("Llama", hidden_size=96, intermediate_size=192, head_dim=32, num_hidden_layers=1)

    def run(*options: str) -> Result:
        command = ["awq", str(model), "--calib", str(calib_text), "--samples", "2", "--seq-len", "32"]
        return CliRunner().invoke(main, [*command, "--device", "cpu", *options, "--effort", "fast"])

    return run


def test_awq_alone_just_works(run_awq: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_awq()
    assert done.exit_code == 0, done.output
    assert "group size: 32, the largest of 128, 64 and 32" in done.stderr
    assert (tmp_path / "artifacts" / "model-awq-w4g32").is_dir()
    manifest = read_manifest(tmp_path / "artifacts" / "model-awq-w4g32")
    assert manifest is not None and manifest.record["options"]["scheme"]["group_size"] == 32


def test_an_explicit_one_is_refused_with_those_that_divide(run_awq: Any, tmp_path: Path) -> None:
    done = run_awq("--group-size", "128", "-o", str(tmp_path / "out"))
    assert done.exit_code == 1 and not (tmp_path / "out").exists()
    assert "--group-size 128 does not divide the 96 inputs of model.layers.0.self_attn.q_proj" in done.stderr
    assert "; --group-size 32 divides those of every layer" in done.stderr
    assert "calibration" not in done.stderr  # before the text was read
    assert json.loads(run_awq("--group-size", "32", "-o", str(tmp_path / "out"), "--json").stdout)["record"]
