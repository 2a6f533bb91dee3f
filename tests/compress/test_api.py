"""The toolkit from Python: three calls, the same artifact as the command line's, and progress to whoever listens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import calibration_data
import compress
from compress.cli.main import main
from compress.errors import ConfigError
from compress.files import file_sha256
from compress.tell import Heard


def test_quantize_judge_export(in_workspace: Path, tmp_path: Path) -> None:
    heard = Heard()
    model, calib = in_workspace / "model", in_workspace / "calib.txt"
    small = {"samples": 2, "seq_len": 64}
    made = compress.quantize_awq(
        model, tmp_path / "awq", group_size=32, effort="fast", calib=calib, tell=heard, device="cpu", **small
    )
    assert made.out == tmp_path / "awq" and len(made.record["layers"]) == 14
    assert len(heard.finished) == 2 and all("layers" in step for step in heard.finished)
    args = ["awq", str(model), "-o", str(tmp_path / "cli"), "--calib", str(calib), "--effort", "fast"]
    done = CliRunner().invoke(
        main, [*args, "--group-size", "32", "--device", "cpu", "--samples", "2", "--seq-len", "64"]
    )
    assert done.exit_code == 0, done.output
    assert len({file_sha256(tmp_path / f / "model.safetensors") for f in ("awq", "cli")}) == 1
    report = compress.evaluate(
        made.out,
        data=calibration_data.default_evaluation(),
        max_tokens=1024,
        context=64,
        gate=0.5,
        tell=Heard(),
        device="cpu",
    )
    assert report.outcome in ("PASS", "INCONCLUSIVE")
    found = {m.name: m for m in report.metrics}
    assert 0.8 < found["perplexity_recovery"].value < 1.1
    exported = compress.export(made.out, target="a100", format="hf", out=tmp_path / "hf", tell=Heard())
    assert (exported.out / "model.safetensors").is_file() and exported.record["target"] == "a100"


def test_mistakes_are_errors_of_ours(reference_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        compress.quantize_awq(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ConfigError, match="there is no such target"):
        compress.export(reference_model, target="toaster")
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        compress.quantise  # noqa: B018


def test_importing_costs_nothing() -> None:
    code = "import sys, compress; print('torch' in sys.modules, compress.__version__)"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.split()[0] == "False"
