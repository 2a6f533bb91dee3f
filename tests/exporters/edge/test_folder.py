"""What may reach Edge-LLM's exporter, and that what is rewritten for it is the same model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint import Checkpoint
from compress.errors import UnsupportedError
from compress.formats import compressed_tensors, stored
from compress.plan import LayerPlan, LayerScheme
from compress.scheme import Scheme
from exporters import reference
from exporters.edge import folder as edge_folder

Make = Callable[..., Path]


def edit(folder: Path, **changes: Any) -> Checkpoint:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return Checkpoint.open(folder)


@pytest.mark.parametrize("family", ["Gemma", "Gemma2", "Olmo2"])
def test_other_architectures_are_refused_before_any_work(family: str, build_model: Make) -> None:
    """The exporter writes all three as a Llama with exit code 0, Gemma without even skipping a tensor."""
    drop = ("head_dim",) if family == "Olmo2" else ()
    checkpoint = Checkpoint.open(build_model(family, drop=drop))
    with pytest.raises(UnsupportedError, match=f"{family.lower()} is not supported by edge yet"):
        edge_folder.check_model(checkpoint, 256)


def test_refusals_name_the_way_out(awq_folder: Make) -> None:
    folder = awq_folder()
    good = Checkpoint.open(folder)
    edge_folder.check_model(good, 256)
    edge_folder.check_zero_points(good)
    quantization = dict(good.config["quantization_config"])
    for changes, message in (
        (
            {"quantization_config": compressed_tensors.config(LayerPlan({"l": LayerScheme(weight=Scheme())}))},
            "compressed-tensors.*--sym",
        ),
        (
            {"quantization_config": {**quantization, "group_size": 64}},
            "group_size 64 is not supported.*--group-size 128",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"sliding_window": 100}, "256 exceeds its sliding window of 100.*--context 100"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn'.*not supported by edge yet"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}, "head_dim": 32}, "head_dim 32.*64 or 128"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            edge_folder.check_model(edit(folder, **{**good.config, "sliding_window": None, **changes}), 256)
    unused = edit(folder, **{**good.config, "sliding_window": 100, "use_sliding_window": False})
    edge_folder.check_model(unused, 256)  # Qwen states a window that it does not use


def test_zero_points_are_looked_at_not_believed(awq_folder: Make) -> None:
    """The config of an asymmetric folder is that of a symmetric one: only the stored zero points tell."""
    checkpoint = Checkpoint.open(awq_folder(symmetric=False))
    edge_folder.check_model(checkpoint, 256)
    with pytest.raises(UnsupportedError, match=r"layers.0.mlp.down_proj has \d+ of 768 zero points other than 8"):
        edge_folder.check_zero_points(checkpoint)


def test_narrow_projection_and_quantized_head_are_refused(awq_folder: Make) -> None:
    folder = awq_folder(num_key_value_heads=1, head_dim=32, num_attention_heads=8)
    with pytest.raises(UnsupportedError, match="k_proj has 32 out_features, not a multiple of 64"):
        edge_folder.check_model(Checkpoint.open(folder), 256)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.qweight"] = torch.zeros(8, 8, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UnsupportedError, match="its lm_head is quantized"):
        edge_folder.check_model(Checkpoint.open(folder), 256)


def test_handed_folder_is_the_artifact(awq_folder: Make, tmp_path: Path) -> None:
    folder = awq_folder()
    (tmp_path / "in").mkdir()
    handed = edge_folder.hand_over(edit(folder, sliding_window=512), tmp_path / "in")
    assert handed.tensors == len(load_file(folder / "model.safetensors")) and handed.ignorable == 0
    assert (tmp_path / "in" / "model.safetensors").is_symlink()
    assert (tmp_path / "in" / "chat_template.jinja").read_text() == edge_folder.PLAIN_TEMPLATE
    assert "sliding_window" not in json.loads((tmp_path / "in" / "config.json").read_text())
    before, after = reference.of_artifact(folder), reference.of_artifact(tmp_path / "in")
    assert torch.equal(before.logits_TV, after.logits_TV)


def test_a_model_keeps_its_own_template(awq_folder: Make, tmp_path: Path) -> None:
    folder = awq_folder()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ messages }}"}))
    (tmp_path / "in").mkdir()
    edge_folder.hand_over(Checkpoint.open(folder), tmp_path / "in")
    assert not (tmp_path / "in" / "chat_template.jinja").exists()


def test_split_phi3_is_a_llama_that_computes_the_same(awq_folder: Make, tmp_path: Path) -> None:
    folder = awq_folder("Phi3", drop=("head_dim",))
    (tmp_path / "in").mkdir()
    handed = edge_folder.hand_over(Checkpoint.open(folder), tmp_path / "in")
    split = Checkpoint.open(tmp_path / "in")
    assert split.config["model_type"] == "llama" and handed.tensors == len(split.tensors)
    before, after = reference.of_artifact(folder), reference.of_artifact(tmp_path / "in")
    assert reference.compare(after.logits_TV, before, tolerance=1e-6, what="split")["same_top_token"] == 1.0
    for name, quantized in edge_folder.expected_int4(Checkpoint.open(folder)):
        assert torch.equal(quantized.dequantize(), stored(split).dense(name)), name
