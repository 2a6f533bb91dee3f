"""INT8 at the widths of real models: outlier channels that smoothing must move, also through 8 value heads of 128."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from compress import activations
from compress.checkpoint import Checkpoint
from compress.formats import stored
from compress.model import StreamedModel
from compress.quantize.int8_stage import Int8Request, quantize_int8
from compress.workspace import resolve

SIZES = {
    "hidden_size": 1024, "intermediate_size": 1408, "num_hidden_layers": 1, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 4096,
}  # fmt: skip
IDS = torch.randint(5, 4000, (1, 64), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def block_output(folder: Path) -> torch.Tensor:
    model = StreamedModel.open(folder)
    hidden = model.embed(IDS)
    model.load_block(0)
    return model.run_block(0, hidden) - hidden


def test_outliers_of_every_group_are_moved_and_the_block_stays_itself(
    build_model: Any, calib_text: Path, tmp_path: Path
) -> None:
    """What a trained model has: a few channels of a norm and of the values are tens of times larger than the others."""
    folder = build_model("Llama", **SIZES)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][::173] *= 40
    tensors["model.layers.0.post_attention_layernorm.weight"][5::211] *= 40
    tensors["model.layers.0.self_attn.v_proj.weight"][7::250] *= 40
    tensors["model.layers.0.mlp.up_proj.weight"][3::290] *= 40
    for layer, start, step in (("self_attn.o_proj", 7, 250), ("mlp.down_proj", 3, 290)):
        weight = tensors[f"model.layers.0.{layer}.weight"]
        weight[:, start::step] /= 40  # read as little as they are large
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    request = Int8Request(
        source=resolve(str(folder)), out=tmp_path / "made", calib=str(calib_text), samples=4, seq_len=64, effort="fast"
    )
    outcome = quantize_int8(request)
    groups = {g["layers"][0].rpartition(".")[2]: g for g in outcome.record["groups"]}
    assert {name: g["fold"].rpartition(".")[2] for name, g in groups.items()} == {
        "q_proj": "input_layernorm", "o_proj": "v_proj", "gate_proj": "post_attention_layernorm", "down_proj": "up_proj"
    }  # fmt: skip
    assert all(g["strength"] > 0 or g["descended"] for g in groups.values()), "each had outliers to move"
    for layer in outcome.record["layers"]:
        assert layer["error"] < 2e-3
        if "o_proj" in layer["layer"] or "down_proj" in layer["layer"]:
            assert layer["error"] < 0.3 * layer["rtn_error"]
    original, found = block_output(folder), block_output(outcome.out)
    assert 0 < float((found - original).square().mean()) < 3e-2 * float(original.square().mean())


def test_sums_over_two_thousand_inputs_are_exact(build_model: Any, calib_text: Path, tmp_path: Path) -> None:
    """o_proj reads 16 heads of 128: more products than float32 holds in one sum."""
    folder = build_model("Llama", **{**SIZES, "intermediate_size": 256})
    request = Int8Request(
        source=resolve(str(folder)), out=tmp_path / "made", calib=str(calib_text), samples=1, seq_len=64,
        effort="fast", smoothing=0.0,
    )  # fmt: skip
    weight = stored(Checkpoint.open(quantize_int8(request).out)).weight("model.layers.0.self_attn.o_proj")
    q_TI = torch.randint(-128, 128, (3, 2048), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    q_TI[0], q_TI[1] = 127, -128
    wanted = q_TI.long() @ weight.signed_OI().long().t()
    assert torch.equal(activations.integer_product(q_TI, weight.signed_OI()).long(), wanted)
