"""`quantize_int8` from folder to folder: what is written, what it computes, what is refused, what a crash leaves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import activations
from compress.artifact import read_manifest
from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError, ConfigError, UnsupportedError
from compress.files import file_sha256
from compress.formats import stored
from compress.model import StreamedModel
from compress.quantize import keep_inputs
from compress.quantize.int8_stage import Int8Request, quantize_int8, request_from_record
from compress.stage import Outcome
from compress.tell import Tell
from compress.workspace import resolve

IDS = torch.randint(5, 4000, (2, 32), generator=torch.Generator().manual_seed(0))
PHI, NEOX = ("head_dim",), ("head_dim", "num_key_value_heads")


@pytest.fixture
def quantize(calib_text: Path, tmp_path: Path) -> Any:
    def run(model: Path, out: str = "out", **changes: Any) -> Outcome:
        options = {"calib": str(calib_text), "samples": 8, "seq_len": 64, "effort": "fast", **changes}
        return quantize_int8(Int8Request(source=resolve(str(model)), out=tmp_path / out, **options))

    return run


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model = StreamedModel.open(folder)
    hidden = model.embed(IDS)
    for i in range(model.num_blocks):
        model.load_block(i)
        hidden = model.run_block(i, hidden)
        model.release_block(i)
    return model.head(hidden)


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("family", "drop"),
    [("Llama", ()), ("Qwen2", PHI), ("Gemma2", ()), ("Phi3", PHI), ("Olmo2", PHI), ("GPTNeoX", NEOX)],
)
def test_families_end_to_end(family: str, drop: tuple[str, ...], build_model: Any, quantize: Any) -> None:
    folder = build_model(family, drop=drop)
    outcome = quantize(folder, effort="balanced", kv_cache="int8")
    record = outcome.record
    assert record["stage"] == "int8" and record["format"] == "compressed-tensors"
    assert {g["block"] for g in record["groups"]} == {0, 1} and all(g["fold"] or g["note"] for g in record["groups"])
    assert {layer["layer"] for layer in record["layers"]} == set(stored(Checkpoint.open(outcome.out)).layers)
    assert len(record["kv_cache"]) == 2
    original, found = logits(folder), logits(outcome.out)
    assert 0 < float((found - original).square().mean()) < 2e-3 * float(original.square().mean())


# ---- what the file is ----------------------------------------------------------------------------------


def test_a_folder_says_what_it_is(build_model: Any, quantize: Any) -> None:
    folder = build_model(dtype="bfloat16")
    outcome = quantize(folder, kv_cache="int8", skip=("layers.0.mlp.down_proj",))
    config = json.loads((outcome.out / "config.json").read_text())
    said = config["quantization_config"]
    assert config["dtype"] == "bfloat16" and said["format"] == "int-quantized"
    assert said["ignore"] == ["lm_head", "model.layers.0.mlp.down_proj"]
    group = said["config_groups"]["group_0"]
    assert (group["weights"]["strategy"], group["input_activations"]["strategy"]) == ("channel", "token")
    assert said["kv_cache_scheme"] is None and said["compress_kv_cache"]["strategy"] == "token_head"
    tensors = Checkpoint.open(outcome.out).tensors
    q = "model.layers.0.self_attn.q_proj"
    assert tensors[f"{q}.weight"].dtype == "I8" and tensors[f"{q}.weight_scale"].dtype == "BF16"
    assert tensors["model.layers.0.mlp.down_proj.weight"].dtype == "BF16"
    opened = StreamedModel.open(outcome.out)
    assert opened.kv is not None and opened.stored.plan[q].label() == record_label(outcome)


def record_label(outcome: Outcome) -> str:
    from compress.plan import LayerPlan

    manifest = read_manifest(outcome.out)
    assert manifest is not None
    return next(iter(LayerPlan.from_json(manifest.record["plan"]).groups())).label()


@pytest.mark.parametrize(
    ("changes", "leaves"),
    [
        ({}, {"weight", "weight_scale"}),
        ({"sym_activations": True}, {"weight", "weight_scale"}),
        ({"static": True}, {"weight", "weight_scale", "input_scale"}),
        ({"static": True, "sym_activations": False}, {"weight", "weight_scale", "input_scale", "input_zero_point"}),
        ({"scheme": "w8a16"}, {"weight_packed", "weight_scale", "weight_shape"}),
        ({"scheme": "w8a16", "group_size": 32}, {"weight_packed", "weight_scale", "weight_shape"}),
    ],
    ids=["w8a8", "w8a8-sym", "static", "static-asym", "w8a16", "w8a16g32"],
)
def test_transformers_computes_our_logits_with_its_activation_quantizers_on(
    changes: dict[str, Any], leaves: set[str], build_model: Any, quantize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own forward over the same file: an implementation that shares no code with ours."""
    from transformers import AutoModelForCausalLM

    outcome = quantize(build_model(), **changes)
    stored_leaves = {n.rpartition(".")[2] for n in Checkpoint.open(outcome.out).names() if ".q_proj." in n}
    assert stored_leaves == leaves
    model = AutoModelForCausalLM.from_pretrained(outcome.out, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(IDS, use_cache=False).logits
    monkeypatch.setattr(activations, "_by_token_symmetric", as_the_library_scales)
    ours = logits(outcome.out)
    error = float((ours - theirs).square().mean() / theirs.square().mean())
    plain = activation_error(outcome.out, ours)
    # A value within float32's noise of half a step may fall on either side, and what follows then differs by a code.
    assert error < 1e-9 or error < 0.1 * plain
    assert (plain > 1e-7) == ("scheme" not in changes)


def test_layers_that_lose_most_keep_their_inputs(
    build_model: Any, quantize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second config group; siblings together; less error; transformers reads both groups and computes our logits."""
    from transformers import AutoModelForCausalLM

    from exporters.hf import vllm_int8

    folder = build_model()
    outcome = quantize(folder, keep_inputs=3)
    kept = [name for group in outcome.record["kept_inputs"]["groups"] for name in group["layers"]]
    assert outcome.record["kept_inputs"]["measured"] == 8 and 3 <= len(kept) <= 9
    errors = {layer["layer"]: layer["inputs_error"] for layer in outcome.record["layers"]}
    assert {name for name, error in errors.items() if error == 0} == set(kept)
    config = json.loads((outcome.out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and len(config["config_groups"]) == 2
    targets = {g["format"]: set(g["targets"]) for g in config["config_groups"].values()}
    assert targets["pack-quantized"] == set(kept) and len(targets["int-quantized"]) == 14 - len(kept)
    vllm_int8.check(stored(Checkpoint.open(outcome.out)), "8.0")  # fused layers have one scheme
    model = AutoModelForCausalLM.from_pretrained(outcome.out, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(IDS, use_cache=False).logits
    monkeypatch.setattr(activations, "_by_token_symmetric", as_the_library_scales)
    ours = logits(outcome.out)
    error = float((ours - theirs).square().mean() / theirs.square().mean())
    assert error < 1e-9 or error < 0.1 * activation_error(outcome.out, ours)
    again = request_from_record(outcome.record, outcome.out, source=resolve(str(folder)), out=outcome.out / "x")
    assert again.keep_inputs == 3 and again.label() == "w8a8-keep3"


def as_the_library_scales(x_TI: torch.Tensor) -> activations.QuantizedInputs:
    """Without a zero point, compressed-tensors gives a token's largest value the code 127.5, and engines 127."""
    scale_T = x_TI.abs().amax(dim=1) / 127.5
    q_TI = (x_TI / scale_T.unsqueeze(1)).round().clamp(-128, 127)
    return activations.QuantizedInputs(q_TI=q_TI.to(torch.int8), scale_T=scale_T)


def activation_error(folder: Path, ours: torch.Tensor) -> float:
    """What rounding the inputs changes: the same weights as a dense model."""
    model = StreamedModel.open(folder)
    hidden = model.embed(IDS)
    with torch.no_grad():
        for i in range(model.num_blocks):
            block = model.load_block(i)
            for module in block.modules():
                activations.uninstall(module)
            hidden = model.run_block(i, hidden)
            model.release_block(i)
        dense = model.head(hidden)
    return float((ours - dense).square().mean() / dense.square().mean())


# ---- the same bytes ------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    build_model: Any, quantize: Any, calib_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build_model(num_hidden_layers=3)
    options: dict[str, Any] = {"static": True, "effort": "balanced", "kv_cache": "int8", "keep_inputs": 2}
    whole = contents(quantize(folder, "whole", **options).out)

    class Killed(Exception):
        pass

    class Stop(Tell):
        measuring = False

        def start(self, unit: str, *args: Any) -> None:
            self.measuring = unit == "measuring block"

        def step(self, done: int | None = None, *args: Any, **kwargs: Any) -> None:
            if done == 2 and not self.measuring:
                raise Killed

    request = Int8Request(
        source=resolve(str(folder)), out=tmp_path / "out", calib=str(calib_text), samples=8, seq_len=64, **options
    )
    with pytest.raises(Killed):
        quantize_int8(request, Stop())
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(keep_inputs, "measure", None)  # what was measured is kept with the run
    outcome = quantize_int8(request)
    assert outcome.resumed == 2 and contents(outcome.out) == whole


def test_a_recorded_recipe_runs_again_also_changed(build_model: Any, quantize: Any, tmp_path: Path) -> None:
    folder = build_model()
    made = quantize(folder, skip=("down_proj",), smoothing=0.5)
    source = resolve(str(folder))
    again = request_from_record(made.record, made.out, source=source, out=tmp_path / "again")
    assert again.options() == made.record["options"]
    assert contents(quantize_int8(again).out) == contents(made.out)
    static = request_from_record(made.record, made.out, source=source, out=tmp_path / "static", static=True)
    assert static.static and static.smoothing == 0.5
    with pytest.raises(ArtifactError, match="stage 'awq'"):
        request_from_record({**made.record, "stage": "awq"}, made.out, source=source, out=tmp_path / "x")


def test_effort_is_what_the_scheme_gains_by(tmp_path: Path) -> None:
    """And what is recorded is what was done, so that a later default changes no recipe."""
    source = resolve(None, quantizable=True, accept=lambda path: False)
    for scheme, effort in (("w8a8", "fast"), ("w8a16", "balanced")):
        request = Int8Request(source=source, out=tmp_path, scheme=scheme)
        assert request.effort == effort == request.options()["effort"]
    assert Int8Request(source=source, out=tmp_path, effort="balanced").effort == "balanced"


def test_inputs_by_token_have_zero_points_and_static_ones_have_none(tmp_path: Path) -> None:
    """Unless asked for otherwise; the name of the artifact says what is unusual."""
    source = resolve(None, quantizable=True, accept=lambda path: False)

    def made(**changes: Any) -> tuple[str, str]:
        request = Int8Request(source=source, out=tmp_path, **changes)
        assert request.options()["sym_activations"] == request.sym_activations is not None
        return request.label(), request.layer_scheme().label()

    assert made() == ("w8a8", "w8-sym-a8-asym")
    assert made(sym_activations=True) == ("w8a8-sym", "w8-sym-a8")
    assert made(static=True) == ("w8a8-static", "w8-sym-a8-static")
    assert made(static=True, sym_activations=False) == ("w8a8-static-asym", "w8-sym-a8-asym-static")
    assert made(scheme="w8a16")[0] == "w8a16"


# ---- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheme": "w4a4"}, "--scheme w4a4 is not one of w8a8, w8a16"),
        ({"group_size": 128}, "--scheme w8a8 has one scale a row"),
        ({"scheme": "w8a16", "static": True}, "--static is about inputs"),
        ({"scheme": "w8a16", "sym_activations": False}, "--asym-activations is about inputs"),
        ({"scheme": "w8a16", "keep_inputs": None}, "--keep-inputs is what --scheme w8a16 does of every layer"),
        ({"keep_inputs": 8}, "--keep-inputs 8 keeps the inputs of all 8 groups"),
        ({"kv_cache": "int4"}, "--kv-cache int4 is not computed"),
        ({"smoothing": 1.5}, "--smoothing 1.5 is outside 0..1"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    changes: dict[str, Any], message: str, build_model: Any, quantize: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize(build_model(), **changes)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_quantized_are_refused(build_model: Any, quantize: Any, tmp_path: Path) -> None:
    folder = build_model()
    with pytest.raises(ConfigError, match="--group-size 48 does not divide the 64 inputs"):
        quantize(folder, scheme="w8a16", group_size=48)
    made = quantize(folder, "made").out
    with pytest.raises(UnsupportedError, match="is quantized already"):
        quantize(made)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(ConfigError, match=r"empty\.txt"):
        quantize(folder, static=True, calib=str(empty))
    assert not (tmp_path / "out").exists()


def test_a_layer_that_would_be_destroyed_stops_the_run_unless_allowed(build_model: Any, quantize: Any) -> None:
    """One channel is huge and read by nobody: with one step for all channels nothing of the others is left."""
    from safetensors.torch import load_file, save_file

    folder = build_model()
    tensors = load_file(folder / "model.safetensors")
    for name in ("gate", "up"):
        tensors[f"model.layers.1.mlp.{name}_proj.weight"][0] *= 60
    tensors["model.layers.1.mlp.down_proj.weight"][:, 0] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"model\.layers\.1\.mlp\.down_proj: quantized, its output would be off"):
        quantize(folder, smoothing=0.0, sym_activations=True)
    allowed = quantize(folder, smoothing=0.0, sym_activations=True, allow_damage=True)
    assert allowed.record["damaged"] == ["model.layers.1.mlp.down_proj"]
    searched = quantize(folder, "searched")
    assert not searched.record["damaged"]
    found = {layer["layer"]: layer["error"] for layer in searched.record["layers"]}
    assert found["model.layers.1.mlp.down_proj"] < 1e-2
