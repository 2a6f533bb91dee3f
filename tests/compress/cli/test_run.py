"""`compress run`: every ready recipe, what is reused, what is refused before anything starts, and a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from compress.cli.main import main
from compress.recipe import ready_recipes

ROOT = Path(__file__).resolve().parents[3]
# Small settings over the ready recipes. Edge-LLM's exporter is no part of the test environment: the graph for plain
# TensorRT takes its place.
SMALL = {
    "a100-awq": ["awq.effort=fast"],
    "a100-int8": ["int8.effort=fast", "int8.samples=2", "int8.seq-len=64"],
    "orin-awq": ["awq.effort=fast", "awq.samples=2", "awq.seq-len=64", "export.format=onnx-trt"],
    "orin-nano-edge": [
        "prune.samples=4", "prune.seq-len=64", 'distill.data=["CALIB"]', "distill.tokens=512", "distill.seq-len=64",
        "distill.batch=4", "awq.effort=fast", "awq.samples=2", "awq.seq-len=64", "export.format=onnx-trt",
    ],
    "cpu-offline": ["awq.effort=fast", "awq.samples=2", "awq.seq-len=64"],
    "lambda": ["awq.effort=fast", "awq.samples=2", "awq.seq-len=64"],
    "a100-auto": [
        "auto.effort=fast", "auto.samples=8", "auto.seq-len=64", "auto.gate=0.9", "auto.tries=1",
        "auto.max-tokens=10240",
    ],
}  # fmt: skip
SMALL["a100-awq"] += ["awq.samples=2", "awq.seq-len=64"]
AT_LAST = ["evaluate.max-tokens=1024"]


@pytest.fixture
def compress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> Result:
        return CliRunner().invoke(main, [str(a) for a in args], catch_exceptions=False)

    return run


def settings(name: str, calib: Path | None = None) -> list[str]:
    return [part for s in [*SMALL[name], *AT_LAST] for part in ("--set", s.replace("CALIB", str(calib)))]


@pytest.mark.slow
def test_bits_are_chosen_in_a_recipe(compress: Any, tmp_path: Path) -> None:
    """What the reader of the export does not take of a mix is refused before anything is measured."""
    recipe = tmp_path / "mix.toml"
    recipe.write_text(
        '[auto]\nbytes = "9M"\neffort = "fast"\nsamples = 8\nseq-len = 64\nmax-tokens = 1024\n'
        '[export]\ntarget = "a100"\nformat = "hf"\n'
    )
    for settings in (["export.target=cpu", "export.format=onnx"], ["auto.bytes=1M"], ["auto.data=absent.txt"]):
        refused = compress("run", recipe, *(part for s in settings for part in ("--set", s)))
        assert refused.exit_code == 1 and "would be refused" in refused.stderr, refused.stderr
    assert not (tmp_path / "artifacts").exists()
    done = compress("run", recipe)
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "artifacts" / "mix-export" / "compress.json").read_text())
    assert [record["stage"] for record in manifest["lineage"]] == ["export", "auto"]
    again = compress("run", recipe)
    assert again.exit_code == 0 and "0 steps made" in again.stdout


def test_every_ready_recipe_is_run_here() -> None:
    assert set(SMALL) == set(ready_recipes())


@pytest.mark.slow
def test_ready_recipes(compress: Any, calib_text: Path, valid_json: Any) -> None:
    """All in one workspace: `cpu-offline` and `lambda` share the quantized model that `a100-awq` made."""
    for name in SMALL:
        _runs(name, calib_text, valid_json)


def _runs(name: str, calib_text: Path, valid_json: Any) -> None:
    args = ["run", name, *settings(name, calib_text), "--json"]
    result = CliRunner().invoke(main, args, catch_exceptions=False)
    assert result.exit_code in (3, 4), (name, "1024 tokens are too few to pass by", result.stderr)
    told = valid_json("run", result.stdout)
    for step in told["steps"]:
        if step["state"] == "made":
            valid_json(step["stage"], json.dumps(step["result"]))
    assert told["exit_code"] == result.exit_code and told["verdict"] in ("FAIL", "INCONCLUSIVE")
    by_step = {s["step"]: s for s in told["steps"]}
    assert all(Path(s["out"]).is_dir() for s in told["steps"])
    assert by_step["evaluate"]["result"]["outcome"] == told["verdict"]
    if name in ("cpu-offline", "lambda"):
        assert by_step["awq"]["state"] == "made before" and by_step["awq"]["out"] == "artifacts/a100-awq-awq"
    if name == "orin-nano-edge":
        lineage = json.loads(Path("artifacts/orin-nano-edge-awq/compress.json").read_text())["lineage"]
        assert [r["stage"] for r in lineage] == ["awq", "distill", "prune"]
        assert lineage[0]["calibration"]["source"] == "bundled:self_sampled", "follows the lineage"
    again = CliRunner().invoke(main, args, catch_exceptions=False)
    assert again.exit_code == result.exit_code and "gate 98.0%" in again.stderr
    assert {s["state"] for s in json.loads(again.stdout)["steps"]} == {"made before"}


FEW = ("--set", "awq.samples=2", "--set", "awq.seq-len=64", "--set", "awq.effort=fast")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[awq]\nbitz = 4", "r.toml line 2: [awq] bitz is no option of compress awq; did you mean bits?"),
        ("[awq]\nasym = true", "r.toml line 2: [awq] asym is written as sym = false"),
        ("[awq]\nbits = 'four'", "r.toml line 2: [awq] bits is 'four': 'four' is not a valid integer"),
        ("[awq]\nsamples = 0", "r.toml line 2: [awq] samples is 0: 0 is not in the range x>=1"),
        ("[awq]\nsamples = 2.5", "r.toml line 2: [awq] samples is 2.5"),
        ("[awq]\nsym = 1", "it is on or off, so write true or false"),
        ("[awq]\nbits = [4]", "takes one value and is given a list"),
        ("[awq]\neffort = 'bost'", "is 'bost': 'bost' is not one of"),
        ("[awq]\nout = 'x'", "r.toml line 2: [awq] out is set by the run itself"),
        ("[awq]\n[export]", "r.toml line 2: [export] has no target; add one"),
        ("[awq]\nbits = 3", "r.toml line 1: [awq] would be refused: --bits 3"),
        ("[awq]\nbits = 3", "; options of a step: --set awq.OPTION=VALUE"),
        ("[awq]\n\n[int8]", "r.toml line 3: [int8] would be refused: artifacts/r-awq is quantized already"),
        ("[awq]\ngroup-size = 80", "[awq] would be refused: "),
        ("[awq]\n[export]\ntarget = 'z80'", "r.toml line 2: [export] would be refused: --target z80"),
        ("[awq]\n[export]\ntarget = 'lambda'\nformat = 'hf'", "the readers of lambda take onnx"),
        ("[awq]\n[export]\ntarget = 'a100'\nbatch = 2000000", "and 72.00 GB of 80 are usable"),
        ("[awq]\nskip = ['*.q_proj']\n[export]\ntarget = 'a100'", "vLLM computes them as one"),
        ("[int8]\n[export]\ntarget = 'orin'", "which readers of edge do not take"),
        ("[prune]\ndepth = 9", "r.toml line 1: [prune] would be refused"),
        ("[prune]\ndepth = 1\n[distill]", "[distill] would be refused: no text to learn on"),
        ("[prune]\ndepth = 1\n[distill]\ndata = ['self']", "--tokens is needed"),
        ("[prune]\ndepth = 1\n[distill]\ndata = ['gone.txt']\ntokens = 99999", "gone.txt does not exist"),
        ("[distill]\ndata = ['self']\ntokens = 9999\nscheme = 'w8a8'", "quantized student; put a step [int8] before"),
        ("[distill]\ncache = '@teach'", "r.toml line 2: @teach is no step before [distill]"),
        ("[prune]\nheads = 2\nkv-heads = 1\n[prune2]\nstage = 'prune'\ndepth = 1", "is pruned already"),
        ("[awq]\n[evaluate]\ncontext = 4096", "--context 4096 is more than"),
        ("[awq]\n[evaluate]\nlimit = 9", "[evaluate] would be refused: --limit 9 counts items of tasks"),
        ("[awq]\n[evaluate]\ndata = 'gone.jsonl'", "gone.jsonl does not exist"),
        ("model = 'nowhere'\n[awq]", "r.toml line 1: nowhere: no such folder"),
    ],
)  # fmt: skip
def test_what_any_step_would_refuse_is_said_before_the_first(compress: Any, text: str, said: str) -> None:
    Path("r.toml").write_text(text)
    result = compress("run", "r.toml")
    assert result.exit_code == 1 and said in result.stderr, result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "compress-plan" not in result.stderr and not Path("artifacts").exists()


def test_a_changed_option_makes_its_step_again_and_what_follows(compress: Any, valid_json: Any) -> None:
    Path("r.toml").write_text("[awq]\n[export]\ntarget = 'a100'\n")
    plan = compress("run", "r.toml", *FEW, "--dry-run", "--json")
    assert plan.exit_code == 0 and not Path("artifacts").exists()
    rows = valid_json("run", plan.stdout)["plan"]
    assert [r["state"] for r in rows] == ["to do", "to do"] and rows[1]["memory_bytes"] > 10**9
    assert rows[0]["command"].startswith("compress awq ") and "--samples 2" in rows[0]["command"]
    assert compress("run", "r.toml", *FEW).exit_code == 0
    size = sum(p.stat().st_size for p in Path("artifacts/r-awq").glob("*.safetensors"))
    assert size == pytest.approx(rows[0]["bytes"], rel=0.02), "as it was foreseen"
    before = {p: p.read_bytes() for p in Path("artifacts").glob("r-*/compress.json")}
    other = compress("run", "r.toml", *FEW, "--set", "awq.sym=true", "--json")
    assert [s["state"] for s in json.loads(other.stdout)["steps"]] == ["made", "made"]
    assert all(p.read_bytes() != content for p, content in before.items())
    only = compress("run", "r.toml", *FEW, "--set", "awq.sym=true", "--set", "export.batch=2", "--json")
    assert [s["state"] for s in json.loads(only.stdout)["steps"]] == ["made before", "made"]
    with open("artifacts/r-awq/config.json", "a") as f:
        f.write("\n")  # no longer what was made
    damaged = compress("run", "r.toml", *FEW, "--set", "awq.sym=true")
    assert damaged.exit_code == 1 and "config.json would be lost" in damaged.stderr


def test_a_plan_needs_a_config_only_and_a_run_weights(compress: Any, calib_text: Path) -> None:
    """An 8B shape, of which no weight is there: sized, checked, and refused where it would start."""
    Path("big").mkdir()
    Path("big/config.json").write_text(json.dumps({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "tie_word_embeddings": False, "max_position_embeddings": 8192,
    }))  # fmt: skip
    texts = ("--set", f"awq.calib={calib_text}", "--set", f"evaluate.data={calib_text}")
    plan = json.loads(compress("run", "a100-awq", "--model", "big", *texts, "--dry-run", "--json").stdout)["plan"]
    assert plan[0]["bytes"] == pytest.approx(5.7e9, rel=0.02), "3.6 GB of INT4, 2.1 GB of embeddings in float16"
    unsaid = compress("run", "a100-awq", "--model", "big", *texts[2:], "--dry-run")
    assert unsaid.exit_code == 1 and "[awq] would be refused: no --calib: " in unsaid.stderr
    started = compress("run", "a100-awq", "--model", "big", *texts)
    assert started.exit_code == 1 and "no safetensors weights" in started.stderr and not Path("artifacts").exists()


def test_what_a_recipe_did_not_make_is_in_the_way(compress: Any) -> None:
    Path("r.toml").write_text("[awq]\n")
    Path("artifacts/r-awq").mkdir(parents=True)
    Path("artifacts/r-awq/mine.txt").write_text("")
    result = compress("run", "r.toml", *FEW)
    assert result.exit_code == 1 and "artifacts/r-awq exists already" in result.stderr
    assert [p.name for p in Path("artifacts").rglob("*")] == ["r-awq", "mine.txt"]


@pytest.mark.slow
def test_killed_it_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Killed in the second step, then run again: the first is not made again, the second goes on at its block."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    text = "[prune]\ndepth = 1\nsamples = 4\nseq-len = 64\n[awq]\nsamples = 8\nseq-len = 256\n"
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "r.toml").write_text(text)
    command = [sys.executable, "-m", "compress", "run", "r.toml"]
    first = subprocess.Popen(command, cwd=tmp_path / "killed", env=environment, stderr=subprocess.PIPE, text=True)
    assert first.stderr is not None
    quantizing = False
    for line in first.stderr:
        quantizing = quantizing or line.startswith("[awq]")
        if quantizing and line.startswith("block 2/"):
            first.send_signal(signal.SIGKILL)
            break
    assert first.wait() == -signal.SIGKILL
    first.stderr.close()
    time.sleep(0.1)
    second = subprocess.run(command, cwd=tmp_path / "killed", env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert "[prune] unchanged: artifacts/r-prune/ is used as it is" in second.stderr
    assert "read back" in second.stderr, "blocks of the killed run"
    assert subprocess.run(command, cwd=tmp_path / "whole", env=environment, capture_output=True).returncode == 0
    for step in ("r-prune", "r-awq"):
        one, other = (tmp_path / name / "artifacts" / step / "compress.json" for name in ("killed", "whole"))
        assert one.read_bytes() == other.read_bytes()
