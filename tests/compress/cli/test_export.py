"""`compress export`, `fit` and `targets` as a stranger uses them, and the commands that must chain."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from compress.cli.main import main

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "tie_word_embeddings": False, "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture
def compress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> Result:
        return CliRunner().invoke(main, [str(a) for a in args], catch_exceptions=False)

    return run


def test_awq_then_export_chain_with_no_arguments(
    compress: Any, build_model: Any, calib_text: Path, tmp_path: Path
) -> None:
    awq = ("awq", str(build_model()), "--bits", "4", "--group-size", "32", "--calib", str(calib_text))
    made = compress(*awq, "--samples", "4", "--seq-len", "64")
    assert made.exit_code == 0, made.output
    exported = compress("export", "--target", "a100")
    assert exported.exit_code == 0, exported.output
    assert "verified: files equal to artifact" in exported.stdout
    assert "wrote artifacts/model-awq-w4g32-a100-hf/  hf for a100;" in exported.stdout
    assert "the same model in FP16" in exported.stdout and "files back" in exported.stderr
    assert exported.stdout.splitlines()[-1].startswith(
        "serve it: vllm serve artifacts/model-awq-w4g32-a100-hf --served"
    )
    # the newest artifact, not the newest export
    again = compress("export", "--target", "orin", "--format", "hf", "--context", "64", "--json")
    result = json.loads(again.stdout)
    assert result["out"] == "artifacts/model-awq-w4g32-orin-hf" and result["requantized"] is None
    assert result["record"]["options"] == {"context": 64, "batch": 256}
    # evaluate takes the newest export and finds its original, from another depth of folders too
    assert compress("export", "--target", "a100", "-o", "deep/er/out", "--json").exit_code == 0
    text = tmp_path / "other.txt"
    text.write_text(calib_text.read_text()[::-1])
    for where in ((), ("deep/er/out",)):
        judged = compress("evaluate", *where, "--data", str(text), "--context", "64", "--max-tokens", "256", "--json")
        assert judged.exit_code == 0, judged.output
        assert json.loads(judged.stdout)["reference"]["path"] == str(tmp_path / "model")
    # awq still goes on from the original, and inspect shows the lineage
    shown = compress("inspect", "artifacts/model-awq-w4g32-a100-hf")
    assert "export from ../model-awq-w4g32" in shown.stdout and "awq from ../../model" in shown.stdout
    taken = compress("awq", "--group-size", "64", "--calib", str(calib_text), "--samples", "4", "--seq-len", "64")
    assert taken.exit_code == 0 and "from which the newest artifact" in taken.stderr


def test_codes_that_were_made_for_the_export_are_judged_as_such(
    compress: Any, build_model: Any, calib_text: Path, tmp_path: Path, valid_json: Any
) -> None:
    """Through the command that the export prints, in a folder whose name needs quotes."""
    model = build_model("Qwen3", name="it's my model", hidden_size=128, head_dim=32, vocab_size=4096)
    awq = ("awq", str(model), "--calib", str(calib_text), "--samples", "4", "--seq-len", "64", "--effort", "fast")
    assert compress(*awq, "-o", "an artifact").exit_code == 0
    made = compress("export", "an artifact", "--target", "orin", "--format", "onnx-trt", "--context", "64")
    assert made.exit_code == 0, made.output
    lines = made.stdout.splitlines()
    (said,) = [line for line in lines if "Judge them: " in line]
    judge = shlex.split(said.split("Judge them: ")[1])
    assert judge[:2] == ["compress", "evaluate"] and judge[-2:] == ["--context", "64"]
    assert shlex.split(lines[-1].split(": ", 1)[1]) == ["python3", f"{judge[2]}/build_engine.py"]
    judged = compress(*judge[1:], "--max-tokens", "256", "--json")
    assert judged.exit_code in (0, 3, 4), judged.output
    report = valid_json("evaluate", judged.stdout)
    assert report["candidate"]["runtime"] == "onnxruntime"
    assert report["judged"].startswith("the export's own, as its onnx-trt files hold them, made of ")
    assert report["judged"].endswith(f"quantized again for orin, not the codes of {tmp_path / 'an artifact'}")
    same = compress("export", "an artifact", "--target", "a100", "--json")
    assert valid_json("export", same.stdout)["requantized"] is None


def test_empty_workspace_exports_the_bundled_model(compress: Any) -> None:
    exported = compress("export", "--target", "h100", "--json")
    assert exported.exit_code == 0
    result = json.loads(exported.stdout)
    assert result["out"] == "artifacts/reference-lm-h100-hf"
    assert result["record"]["parent"]["path"] == "bundled:reference_lm"
    assert result["fp16_bytes"] == pytest.approx(22.03e6, rel=1e-3)
    # parts hold the vocabulary and the tokenizer, so the ratio stays below 1
    assert 0.97 < result["record"]["ratio_to_fp16"] < 1
    assert "the workspace is empty" in exported.stderr


def test_too_big_gives_the_breakdown_and_what_would_fit(compress: Any) -> None:
    refused = compress("export", "--target", "a100", "--batch", "2000000")
    assert refused.exit_code == 1
    assert "KV cache" in refused.stderr and "would fit: --batch" in refused.stderr
    assert "error: reference-lm" in refused.stderr.replace("reference_lm", "reference-lm")
    assert not Path("artifacts").exists() or not list(Path("artifacts").iterdir())
    told = compress("export", "--target", "a100", "--batch", "2000000", "--json")
    assert told.exit_code == 1
    found = json.loads(told.stdout)
    assert not found["sizing"]["fits"] and found["fitting"] and all(f["fits"] for f in found["fitting"])
    batch = next(int(f["change"].split()[1]) for f in found["fitting"] if f["change"].startswith("--batch"))
    assert compress("export", "--target", "a100", "--batch", str(batch), "--json").exit_code == 0


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("export",), 2, "--target"),
        (("export", "--target", "z80"), 1, "there is no such target; known are a100-40g, a100"),
        (("export", "nowhere", "--target", "a100"), 1, "nowhere: no such folder"),
        (("export", "--target", "lambda", "--format", "hf"), 1, "the readers of lambda take onnx"),
        (("export", "--target", "a100", "--opset", "24"), 1, "only the formats onnx-trt and tensorrt have dialects"),
        (("export", "--target", "a100", "--profiles", "one"), 1, "only the format tensorrt builds engines, not hf"),
        (("export", "--target", "a100", "--opset", "22"), 2, "--opset"),
        (("export", "--target", "cpu", "--no-modelopt"), 1, "only the format hf has a ModelOpt folder, not onnx"),
        (("export", "--target", "a100", "--context", "9999"), 1, "was made for at most 2048 tokens"),
        (("fit", "--target", "z80"), 1, "there is no such target"),
        (("fit", "nowhere", "--target", "orin"), 1, "nowhere: no such folder"),
        (("fit", "some-org/some-model", "--target", "orin"), 1, "the hub did not give it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_sentence(compress: Any, args: tuple[str, ...], code: int, message: str) -> None:
    result = compress(*args)
    assert result.exit_code == code and message in result.stderr and "Traceback" not in result.output
    if code == 1:
        assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1


def test_fit_before_anything_is_quantized(compress: Any, tmp_path: Path) -> None:
    """From config.json alone; Llama-3-8B in INT4 fits an Orin NX of 16 GB and not one of 8."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps(CONFIG))
    fits = compress("fit", "llama", "--target", "orin-nx-16g", "--json")
    assert fits.exit_code == 0
    found = json.loads(fits.stdout)
    assert found["parameters"] == 8_030_261_248, "as its model card counts them"
    rows = {(r["weights"], r["kv_bits"], r["context"]): r for r in found["choices"]}
    assert {key[0] for key in rows} == {"FP16", "INT8", "INT4 g128"}
    assert {key[1] for key in rows} == {16, 8} and len({key[2] for key in rows}) >= 3
    assert rows["INT4 g128", 16, 4096]["fits"] and not rows["FP16", 16, 4096]["fits"]
    assert rows["INT8", 16, 2048]["made"], "edge, the first reader of this target, takes W8A8 with static inputs"
    speed = rows["INT4 g128", 16, 2048]["sizing"]["predicted"]["decode_tokens_per_s"]
    assert 5 < speed[0] < speed[1] < 25
    small = compress("fit", "llama", "--target", "orin-nx-8g")
    assert small.exit_code == 1
    assert "none of these fits. What would: --target orin-nx-16g" in small.stdout
    assert "predicted" in small.stdout and "not measured" in small.stdout


def test_fit_with_no_model_takes_the_original(compress: Any) -> None:
    shown = compress("fit", "--target", "orin", "--context", "1024")
    assert shown.exit_code == 0 and "the bundled reference model" in shown.stderr
    assert "1024" in shown.stdout and "8192" not in shown.stdout


@pytest.mark.parametrize("columns", [80, 120])
def test_formats_of_a_target_stand_on_one_line(columns: int) -> None:
    """On a terminal of 80 columns too: the titles are left to --json there, and it says so."""
    from rich.console import Console

    from compress.cli.targets import table_for
    from exporters.sizing.targets import TARGETS

    console = Console(width=columns, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(table_for(columns))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= columns
    for name, target in TARGETS.items():
        (line,) = [x for x in lines if x.split("\u2502")[1:2] and x.split("\u2502")[1].strip() == name]
        assert ", ".join(target.formats) in line
        assert (target.title.split()[0] in line) == (columns == 120)


def test_targets(compress: Any) -> None:
    shown = compress("targets")
    assert shown.exit_code == 0 and "Jetson AGX Orin 64GB" in shown.stdout and "204.8" in shown.stdout
    told = json.loads(compress("targets", "--json").stdout)
    assert told["a100"]["formats"][0] == "hf" and "data sheet" in told["a100"]["sources"]["bandwidth"]
