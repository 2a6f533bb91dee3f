"""`quantize_awq` from folder to folder: what is written, what is refused, and what a crash leaves."""

import contextlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import numerics
from compress.artifact import read_manifest
from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError, CompressError, ConfigError, UnsupportedError
from compress.files import file_sha256
from compress.linear import linears, set_weight_OI, weight_OI
from compress.model import StreamedModel
from compress.quantize.awq_stage import AwqRequest, quantize_awq, request_from_record
from compress.scheme import Scheme
from compress.stage import Outcome
from compress.tell import Tell
from compress.tokens import load_tokenizer
from compress.workspace import resolve

G32 = Scheme(group_size=32)


@pytest.fixture
def quantize(calib_text: Path, tmp_path: Path) -> Any:
    def run(model: Path, out: str = "out", scheme: Scheme = G32, **changes: Any) -> Outcome:
        options = {"calib": str(calib_text), "samples": 8, "seq_len": 64, **changes}
        return quantize_awq(AwqRequest(source=resolve(str(model)), out=tmp_path / out, scheme=scheme, **options))

    return run


@torch.no_grad()
def logits(folder: Path, ids: torch.Tensor, nearest: Scheme | None = None) -> torch.Tensor:
    """nearest: what every linear of the blocks is rounded to first."""
    model = StreamedModel.open(folder)
    hidden = model.embed(ids)
    for i in range(model.num_blocks):
        block = model.load_block(i)
        for layer in linears(block).values() if nearest else ():
            set_weight_OI(layer, numerics.round_to_nearest(weight_OI(layer), nearest))
        hidden = model.run_block(i, hidden)
        model.release_block(i)
    return model.head(hidden)


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def random_text(tmp_path: Path, reference_model: Path) -> Path:
    """Text of random tokens: like `IDS`, which the tests compare logits on."""
    ids = torch.randint(1, 4096, (4000,), generator=torch.Generator().manual_seed(1))
    path = tmp_path / "random.txt"
    path.write_text(load_tokenizer(reference_model).decode(ids.tolist()), encoding="utf-8")
    return path


IDS = torch.randint(0, 4096, (2, 32), generator=torch.Generator().manual_seed(0))


FAMILIES = ["Llama", "Qwen2", "Gemma2", "Phi3", "Olmo2", "GPTNeoX"]


@pytest.mark.parametrize(
    ("family", "effort"),
    [(f, "fast") for f in FAMILIES] + [(f, "balanced") for f in FAMILIES] + [("Gemma2", "best"), ("Phi3", "best")],
)
def test_families_end_to_end(family: str, effort: str, build_model: Any, quantize: Any, random_text: Path) -> None:
    """The artifact computes nearly what the original does, and every group is accounted for in the manifest."""
    drop = {
        "Phi3": ("head_dim",), "Olmo2": ("head_dim",), "Qwen2": ("head_dim",),
        "GPTNeoX": ("head_dim", "num_key_value_heads"),
    }  # fmt: skip
    folder = build_model(family, drop=drop.get(family, ()))
    outcome = quantize(folder, effort=effort, tune_steps=5, self_samples=0, calib=str(random_text))
    manifest = read_manifest(outcome.out)
    assert manifest is not None
    record = manifest.record
    assert record["parent"]["sha256"] == Checkpoint.open(folder).content_sha256()
    assert {g["block"] for g in record["groups"]} == {0, 1}
    assert all(g["fold"] or g["note"] for g in record["groups"])
    assert {layer["layer"] for layer in record["layers"]} == {
        n.removesuffix(".qweight") for n in Checkpoint.open(outcome.out).names() if n.endswith(".qweight")
    }
    assert all(layer["error"] < layer["rtn_error"] * 1.05 for layer in record["layers"])
    original = logits(folder, IDS)
    error, plain_error = (
        float((found - original).square().mean()) for found in (logits(outcome.out, IDS), logits(folder, IDS, G32))
    )
    # Random weights have no outliers to win on, and 512 tokens are few for error feedback; a wrong fold or a wrong
    # layout costs far more than this.
    assert 0 < error < 1.2 * plain_error
    assert error < 0.1 * float(original.square().mean())
    assert outcome.verified > len(record["layers"]) * 3


def test_artifact_is_a_complete_folder(build_model: Any, quantize: Any) -> None:
    folder = build_model(dtype="bfloat16")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("of the original")
    outcome = quantize(folder, skip=("layers.0.mlp.down_proj",))
    config = json.loads((outcome.out / "config.json").read_text())
    assert config["dtype"] == "float16" and "torch_dtype" not in config
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head", "model.layers.0.mlp.down_proj"]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (outcome.out / name).read_bytes() == (folder / name).read_bytes()
    assert outcome.record["files_not_carried"] == ["README.md"]
    tensors = Checkpoint.open(outcome.out).tensors
    assert tensors["model.layers.0.mlp.down_proj.weight"].dtype == "F16"
    assert tensors["model.layers.1.mlp.down_proj.qweight"].dtype == "I32"
    assert not list(outcome.out.parent.glob(".*")) and not list(outcome.out.glob(".*"))


@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
def test_eight_bits_are_a_compressed_tensors_folder_that_transformers_computes(
    effort: str, build_model: Any, quantize: Any, random_text: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = build_model("Llama")
    scheme = Scheme(num_bits=8, group_size=32, symmetric=True)
    options: dict[str, Any] = {"calib": str(random_text), "effort": effort, "tune_steps": 10, "self_samples": 0}
    outcome = quantize(folder, scheme=scheme, **options)
    assert outcome.record["format"] == "compressed-tensors" and outcome.record["stage"] == "awq"
    config = json.loads((outcome.out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert config["config_groups"]["group_0"]["weights"]["num_bits"] == 8
    assert any(group["ratio"] for group in outcome.record["groups"])
    original, found = logits(folder, IDS), logits(outcome.out, IDS)
    assert 0 < float((found - original).square().mean()) < 1e-3 * float(original.square().mean())
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(outcome.out, dtype=torch.float32).eval()(IDS).logits
    assert float((found - theirs).norm() / theirs.norm()) < 1e-5


def test_codes_that_no_reader_takes_are_refused(build_model: Any, quantize: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no kernels for 8-bit weights with zero points"):
        quantize(build_model(), scheme=Scheme(num_bits=8, group_size=32))
    with pytest.raises(UnsupportedError, match="--bits 3: .* makes codes of 4 bits .* and of 8"):
        quantize(build_model(), scheme=Scheme(num_bits=3, group_size=32))
    assert not (tmp_path / "out").exists()


def test_symmetric_writes_eights(build_model: Any, quantize: Any) -> None:
    outcome = quantize(build_model(), scheme=Scheme(group_size=32, symmetric=True))
    checkpoint = Checkpoint.open(outcome.out)
    zeros = [n for n in checkpoint.names() if n.endswith(".qzeros")]
    assert len(zeros) == 14
    assert all(bool((checkpoint.tensor(n) == -2004318072).all()) for n in zeros)  # 0x88888888


def test_same_bytes_twice_and_from_a_sharded_folder(build_model: Any, quantize: Any) -> None:
    folder = build_model()
    first = contents(quantize(folder, "one").out)
    second = contents(quantize(folder, "two").out)
    assert first == second
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[::2]}, folder / "model-00001-of-00002.safetensors")
    save_file({n: tensors[n] for n in names[1::2]}, folder / "model-00002-of-00002.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    sharded = contents(quantize(folder, "three").out)
    assert sharded["model.safetensors"] == first["model.safetensors"]


def test_beyond_one_shard_the_blocks_files_become_the_shards(
    build_model: Any, quantize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build_model()
    whole = Checkpoint.open(quantize(folder, "whole").out)
    monkeypatch.setattr("compress.assemble.MAX_SHARD_BYTES", 100_000)
    sharded = Checkpoint.open(quantize(folder, "sharded").out)
    files = {info.file for info in sharded.tensors.values()}
    assert len(files) > 2 and all(file.startswith("model-000") for file in files)
    assert sharded.names() == whole.names()
    assert all(torch.equal(sharded.tensor(n), whole.tensor(n)) for n in whole.names())


def test_awq_beats_round_to_nearest_on_the_reference_model(reference_model: Path, quantize: Any) -> None:
    """On real weights each step must pay: feedback in fitted ranges lowers the summed layer error, scales once more."""
    error = {}
    for name, smooth in (("plain", False), ("scaled", True)):
        outcome = quantize(
            reference_model, name, Scheme(), calib=None, samples=16, seq_len=256, smooth=smooth, effort="fast"
        )
        error[name] = sum(layer["error"] for layer in outcome.record["layers"])
        rtn = sum(layer["rtn_error"] for layer in outcome.record["layers"])
    print(error, rtn)
    assert error["plain"] < 0.7 * rtn
    assert error["scaled"] < error["plain"]


def test_fast_is_balanced_that_answers_no_block_before(build_model: Any, quantize: Any, random_text: Path) -> None:
    """Nothing lies before the first block, so both make the same of it, but for scales, which each confirms in its way.
    What becomes of the second follows from the first's rounding with `balanced` alone."""
    folder = build_model()
    made = {}
    for effort in ("fast", "balanced"):
        for skip in ((), ("layers.0.*",)):
            options = {"effort": effort, "skip": skip, "calib": str(random_text), "smooth": False}
            outcome = quantize(folder, f"{effort}{len(skip)}", **options)
            tensors = Checkpoint.open(outcome.out)
            made[effort, bool(skip)] = {n: tensors.tensor(n) for n in tensors.names() if ".layers." in n}

    def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], block: int) -> bool:
        names = [n for n in one if n.startswith(f"model.layers.{block}.")]
        assert len(names) > 7
        return all(torch.equal(one[n], other[n]) for n in names)

    assert same(made["fast", False], made["balanced", False], 0)
    assert not same(made["fast", False], made["balanced", False], 1)
    assert same(made["fast", False], made["fast", True], 1)
    assert not same(made["balanced", False], made["balanced", True], 1)


def test_a_recorded_recipe_runs_again(build_model: Any, quantize: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """From the manifest alone, in another working folder: the same options, the same text, the same bytes."""
    folder = build_model()
    made = quantize(folder, skip=("down_proj",), smooth=False, seed=3)
    monkeypatch.chdir(tmp_path / "model")
    again = request_from_record(made.record, made.out, source=resolve(str(folder)), out=tmp_path / "again", scheme=G32)
    assert again.options() == made.record["options"]
    assert contents(quantize_awq(again).out) == contents(made.out)


@pytest.mark.parametrize("source", ["self", "hf:some/set:train:text", "bundled:self_sampled"])
def test_recorded_calibration_without_a_file(source: str, build_model: Any, tmp_path: Path) -> None:
    parent = resolve(str(build_model()))
    options = AwqRequest(source=parent, out=tmp_path / "x", scheme=G32).options()
    record = {"stage": "awq", "options": options, "calibration": {"source": source}, "parent": {"path": "p"}}
    request = request_from_record(record, tmp_path / "x", source=parent, out=tmp_path / "y", scheme=G32)
    assert request.calib == (None if source.startswith("bundled") else source)
    assert request.options() == options


def test_best_adds_the_models_own_text(build_model: Any, quantize: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build_model()
    options = {"effort": "best", "tune_steps": 2, "samples": 4}
    first = quantize(folder, "one", self_samples=3, **options)
    calibration = first.record["calibration"]
    assert (calibration["num_samples"], calibration["num_sampled_from_model"]) == (4, 3)
    assert any("3 sampled from the model" in note for note in first.notes)
    assert len(first.record["tuning"]) == 2 and all(t["held_out_error"] > 0 for t in first.record["tuning"])
    assert contents(first.out) == contents(quantize(folder, "two", self_samples=3, **options).out)
    assert contents(first.out) != contents(quantize(folder, "three", self_samples=3, seed=1, **options).out)
    for enough, most, added in (
        (6, 128, 4),
        (12, 128, 8),
        (12, 3, 3),
    ):  # as many as the text has, up to `enough` in all
        monkeypatch.setattr("compress.calibration_rows.ENOUGH_ROWS", enough)
        monkeypatch.setattr("compress.calibration_rows.MOST_OWN_ROWS", most)
        made = quantize(folder, f"four-{added}", **options)
        assert made.record["calibration"]["num_sampled_from_model"] == added
    monkeypatch.setattr("compress.sampling.LARGEST_ON_CPU", 1000)
    large = quantize(folder, "five", **options)
    assert large.record["calibration"]["num_sampled_from_model"] == 0
    assert any("was not sampled from" in note and "--self-samples 3" in note for note in large.notes)
    with pytest.raises(ConfigError, match="all rows are sampled from the model itself already"):
        quantize(folder, "six", effort="best", self_samples=3, calib="self")
    with pytest.raises(ConfigError, match="effort 'most' is not one of"):
        quantize(folder, "seven", effort="most")


# ---- refusals ----------------------------------------------------------------------------------------


def assert_refused(run: Any, out: Path, kind: type[CompressError], message: str) -> None:
    with pytest.raises(kind, match=message):
        run()
    assert not out.exists()


def damage(folder: Path, name: str, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


def with_value(value: float) -> Any:
    def change(w: torch.Tensor) -> torch.Tensor:
        w = w.clone()
        w.view(-1)[3] = value
        return w

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_damaged_weights(value: float, build_model: Any, quantize: Any, tmp_path: Path) -> None:
    folder = build_model()
    name = "model.layers.1.self_attn.q_proj.weight"
    damage(folder, name, with_value(value))
    assert_refused(lambda: quantize(folder), tmp_path / "out", ArtifactError, f"tensor {name} has 1 NaN or infinite")


def test_missing_tensor_and_wrong_shape(build_model: Any, quantize: Any, tmp_path: Path) -> None:
    folder = build_model()
    name = "model.layers.0.mlp.up_proj.weight"
    damage(folder, name, lambda w: w[:-1].contiguous())
    assert_refused(lambda: quantize(folder), tmp_path / "out", ArtifactError, "config belongs to another model")
    damage(folder, name, lambda w: None)
    assert_refused(lambda: quantize(folder), tmp_path / "out", ArtifactError, f"tensor {name} is missing")


def test_value_beyond_float16(build_model: Any, quantize: Any, tmp_path: Path) -> None:
    folder = build_model()
    damage(folder, "model.norm.weight", with_value(1e6))
    assert_refused(lambda: quantize(folder), tmp_path / "out", ArtifactError, r"model.norm.weight reaches 1e\+06")


def test_group_size_that_does_not_divide(shared_data: Path, quantize: Any, tmp_path: Path) -> None:
    run = lambda: quantize(shared_data / "stories260K", scheme=Scheme())  # noqa: E731
    assert_refused(run, tmp_path / "out", ConfigError, "--group-size 128 does not divide the 64 inputs of model")


def test_third_party_model(shared_data: Path, quantize: Any) -> None:
    outcome = quantize(shared_data / "stories260K", scheme=G32, skip=("mlp",))
    ids = IDS % 512
    original, quantized = logits(shared_data / "stories260K", ids), logits(outcome.out, ids)
    assert float((quantized - original).square().mean() / original.square().mean()) < 0.02


def test_gpt2_is_refused_with_the_reason(build_model: Any, quantize: Any, tmp_path: Path) -> None:
    drop = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    more = ("num_key_value_heads", "max_position_embeddings")
    folder = build_model("GPT2", drop=drop + more, n_embd=64, n_layer=2, n_head=4)
    assert_refused(lambda: quantize(folder), tmp_path / "out", UnsupportedError, "Conv1D")


def test_mixture_of_experts_is_refused(build_model: Any, quantize: Any, tmp_path: Path) -> None:
    folder = build_model("Mixtral", num_local_experts=4)
    assert_refused(lambda: quantize(folder), tmp_path / "out", CompressError, "mixture-of-experts")


def test_quantized_input_existing_output_and_bad_skip(build_model: Any, quantize: Any, tmp_path: Path) -> None:
    folder = build_model()
    out = quantize(folder).out
    assert_refused(lambda: quantize(out, "again"), tmp_path / "again", UnsupportedError, "is quantized already")
    before = contents(out)
    with pytest.raises(ConfigError, match="exists already; pass --force"):
        quantize(folder)
    assert contents(out) == before
    assert contents(quantize(folder, force=True).out) == before
    run = lambda: quantize(folder, "skipped", skip=("nothing_like_it",))  # noqa: E731
    assert_refused(run, tmp_path / "skipped", ConfigError, "matches no layer; layers are called like model.layers.0")
    run = lambda: quantize(folder, "skipped", skip=("*",))  # noqa: E731
    assert_refused(run, tmp_path / "skipped", ConfigError, "leaves nothing to quantize")


def test_full_disk(build_model: Any, quantize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build_model()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    assert_refused(lambda: quantize(folder), tmp_path / "out", ArtifactError, "0.00 GB are free")


def test_tokenizer_of_another_model(build_model: Any, quantize: Any, tmp_path: Path) -> None:
    folder = build_model(vocab_size=64)
    assert_refused(lambda: quantize(folder), tmp_path / "out", ConfigError, "vocabulary")


def test_empty_calibration_text(build_model: Any, quantize: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert_refused(lambda: quantize(build_model(), calib=str(empty)), tmp_path / "out", ConfigError, "empty.txt")


# ---- crashes -----------------------------------------------------------------------------------------

DRIVER = """
from pathlib import Path
from compress.quantize.awq_stage import AwqRequest, quantize_awq
from compress.scheme import Scheme
from compress.workspace import resolve
import transformers, compress.model, compress.calibration_rows
transformers.AutoTokenizer, transformers.LlamaForCausalLM
model, out, calib = sys.argv[1:]
def work():
    quantize_awq(AwqRequest(source=resolve(model), out=Path(out), scheme=Scheme(group_size=32), calib=calib,
                            samples=8, seq_len=64))
"""


def test_resume_takes_up_finished_blocks(build_model: Any, quantize: Any, calib_text: Path, tmp_path: Path) -> None:
    folder = build_model(num_hidden_layers=3)
    whole = contents(quantize(folder, "whole").out)
    request = AwqRequest(
        source=resolve(str(folder)), out=tmp_path / "out", scheme=G32, calib=str(calib_text), samples=8, seq_len=64
    )

    class Killed(Exception):
        pass

    class Stop(Tell):
        def step(self, done: int | None = None, *args: Any, **kwargs: Any) -> None:
            if done == 2:
                raise Killed

    with pytest.raises(Killed):
        quantize_awq(request, Stop())
    assert not (tmp_path / "out").exists()
    (scratch,) = tmp_path.glob(".out.*.partial")
    other = quantize(folder, "out", samples=4)
    assert any(f"{scratch} holds an unfinished run (samples=8 and not 4" in note for note in other.notes)
    shutil.rmtree(other.out)
    # a block that the disk changed is done again
    part = scratch / "block-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"\x7f")
    outcome = quantize_awq(request)
    assert outcome.resumed == 1
    assert contents(outcome.out) == whole


@pytest.mark.slow
def test_killed_at_any_moment_the_bytes_are_the_same(
    build_model: Any, quantize: Any, forks: Any, calib_text: Path, tmp_path: Path
) -> None:
    """kill -9 at random moments of a process, again and again, until a run survives."""
    folder = build_model(num_hidden_layers=4)
    whole = contents(quantize(folder, "whole").out)
    out = tmp_path / "out"
    generator = random.Random(4)
    runs = forks(DRIVER, folder, out, calib_text)
    killed = 0
    for patience in [0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8]:
        process = runs.start()
        time.sleep(patience * generator.random())
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        killed += runs.code() == -signal.SIGKILL
        assert not list(tmp_path.glob("out/*")) or contents(out) == whole
    assert killed >= 4
    finished = out.exists()  # by a run that was too fast, or killed when only its scratch was left
    runs.start()
    assert runs.code() == 0 or finished
    assert contents(out) == whole
    assert not list(tmp_path.glob(".out*"))
