"""The toolkit from Python: each stage one call, the command line's artifact, and progress to whoever listens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import calibration_data
import compress
from compress.cli.main import main
from compress.errors import ConfigError
from compress.files import file_sha256
from compress.tell import SILENT, Heard


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


def test_the_other_stages_make_what_the_command_line_makes(
    in_workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, calib = tmp_path / "model", tmp_path / "calib.txt"
    small = ["--calib", str(calib), "--samples", "8", "--seq-len", "64", "--device", "cpu"]
    given: dict[str, Any] = {"calib": calib, "samples": 8, "seq_len": 64, "device": "cpu", "tell": SILENT}
    found = compress.auto(model, "auto", gate=None, num_bytes=1_130_000, effort="fast", **given)
    pairs = [
        (compress.quantize_int8(model, "int8", scheme="w8a16", group_size=32, effort="fast", **given).out,
         ["int8", str(model), "--scheme", "w8a16", "--group-size", "32", "--effort", "fast", *small]),
        (compress.prune_model(model, "prune", depth=1, self_samples=2, watch=calib, **given).out,
         ["prune", str(model), "--depth", "1", "--self-samples", "2", "--watch", str(calib), *small]),
        (found.out, ["auto", str(model), "--bytes", "1.13M", "--effort", "fast", *small]),
    ]  # fmt: skip
    for made, args in pairs:
        done = CliRunner().invoke(main, [*args, "-o", f"cli-{made}"])
        assert done.exit_code == 0, done.output
        assert file_sha256(made / "model.safetensors") == file_sha256(Path(f"cli-{made}", "model.safetensors"))
    assert found.best is not None and found.best.num_bytes <= 1_130_000
    learned = compress.distill_model(
        "prune", model, "distilled", data=[calib], tokens=512, seq_len=64, batch=4, device="cpu", tell=SILENT
    )
    assert learned.record["tokens"] == 512 and learned.out == Path("distilled")
    with pytest.raises(ConfigError, match="no text to learn on"):
        compress.distill_model("prune", model, "again")
    with pytest.raises(ConfigError, match="no --data"):
        compress.auto(model, "again", calib=calib)


def test_a_recipe(in_workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate that does not pass is an outcome, a mistake in the recipe an error."""
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(
        f'model = "{tmp_path / "model"}"\n[awq]\ncalib = "calib.txt"\nsamples = 2\nseq-len = 64\neffort = "fast"\n'
        f'group-size = 32\n[evaluate]\ndata = "{calibration_data.default_evaluation()}"\ncontext = 64\n'
        "max-tokens = 2048\ngate = 0.5\n"
    )
    found = compress.run_recipe("mine.toml")
    assert found.verdict == "PASS" and found.exit_code == 0
    assert [step["state"] for step in found.steps] == ["made", "made"]
    failed = compress.run_recipe("mine.toml", settings={"evaluate.gate": 0.9999})
    assert failed.verdict in ("FAIL", "INCONCLUSIVE") and failed.exit_code in (3, 4)
    assert failed.steps[0]["state"] == "made before"
    with pytest.raises(ConfigError, match="efort"):
        compress.run_recipe("mine.toml", settings={"awq.efort": "fast"})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a recipe is run by one process, and 2 were started"):
        compress.run_recipe("mine.toml")


def test_the_page_shows_every_call() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    for name in compress.__all__:
        if name != "__version__":
            assert f"`compress.{name}(" in page, name
    for block in page.split("```python\n")[1:]:
        compile(block.split("```")[0], "docs/python.md", "exec")


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


def test_int8_from_python_decides_as_the_request_does() -> None:
    """What the call leaves open is what the command leaves open: a default that is written twice drifts apart."""
    import dataclasses
    import inspect

    from compress.quantize.int8_stage import Int8Request

    asked = {name: p.default for name, p in inspect.signature(compress.quantize_int8).parameters.items()}
    asked["sym_activations"] = asked.pop("symmetric_activations")
    fields = ("scheme", "group_size", "static", "sym_activations", "keep_inputs", "kv_cache", "smoothing", "effort")
    meant = {field.name: field.default for field in dataclasses.fields(Int8Request)}
    assert {name: asked[name] for name in fields} == {name: meant[name] for name in fields}
