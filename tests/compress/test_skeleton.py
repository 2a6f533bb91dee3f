"""A config.json is compared with the weights beside it before anything is built from it."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import ArtifactError, CompressError, UnsupportedError
from compress.model import StreamedModel


def configured(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vocab_size": 4095}, r"embed_tokens.weight has shape \(4096, 64\), but config.json says \(4095, 64\)"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers = 10000000, more than the 21 tensors"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers = 10{30}, more than"),
        ({"hidden_size": 10**12}, "hidden_size = 1000000000000, more than"),
        ({"num_labels": 10**9}, "num_labels = 1000000000, more than"),
        ({"hidden_size": 0}, "hidden|embed"),
        ({"num_attention_heads": 0}, "cannot build|does not take"),
        ({"hidden_act": "nothing"}, "nothing"),
        ({"model_type": "unheard_of"}, "does not take its config.json of type 'unheard_of'"),
        ({"model_type": 7}, "model_type is '7', not a text"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', not a list"),
        ({"quantization_config": "awq"}, "quantization_config is 'awq', not a table"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method 'gptq' is not read"),
        ({"rope_parameters": {"rope_type": "none such"}}, "none such|rope"),
        ({"hidden_size": "64"}, "hidden_size|64"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps|x"),
    ],
)
def test_a_config_that_does_not_fit(build_model: Any, changes: dict[str, Any], says: str) -> None:
    started = time.monotonic()
    with pytest.raises(CompressError, match=says):
        StreamedModel.open(configured(build_model(), **changes))
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' * 3000 + "1" + "}" * 3000, '{"a": NaN}', '{"a": ' + "9" * 5000 + "}"]
)
def test_json_that_is_none(build_model: Any, text: str) -> None:
    folder = build_model()
    (folder / "config.json").write_text(text)
    with pytest.raises(CompressError, match="config.json: not valid JSON"):
        StreamedModel.open(folder)


def test_a_table_for_every_pair_of_positions(build_model: Any) -> None:
    """GPT-Neo computes a mask of max_position_embeddings squared, in every block."""
    drop = ("intermediate_size", "num_hidden_layers", "num_key_value_heads", "num_attention_heads", "head_dim")
    folder = build_model("GPTNeo", drop=drop, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]])
    StreamedModel.open(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.wpe.weight"] = torch.zeros(100_000, 64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match="compute tables of more than 10 GB"):
        StreamedModel.open(configured(folder, max_position_embeddings=100_000))


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("lm_head.weight", lambda t: t.t(), r"lm_head.weight has shape \(64, 4096\)"),
        ("lm_head.weight", lambda t: t[:2048], r"lm_head.weight has shape \(2048, 64\)"),
        ("model.norm.weight", lambda t: t[:1], r"model.norm.weight has shape \(1,\)"),
        ("model.norm.weight", lambda t: t.to(torch.int32), "model.norm.weight is stored as I32"),
        ("model.layers.1.mlp.up_proj.weight", lambda t: t.reshape(64, 128), "up_proj.weight has shape"),
    ],
    ids=["transposed", "halved", "norm", "integers", "reshaped"],
)
def test_a_tensor_of_another_shape(build_model: Any, name: str, change: Any, says: str) -> None:
    folder = build_model()
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match=says):
        StreamedModel.open(folder)


def test_bytes_without_scales_are_numbers(build_model: Any) -> None:
    """FP8 weights that nothing scales mean what they say; transformers reads them so."""
    folder = build_model()
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = StreamedModel.open(folder)
    assert torch.equal(model.load_block(0).mlp.up_proj.weight, tensors[name].float())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("family", "auto", "says"),
    [
        ("Bert", "MaskedLM", "reads a text in both directions"),
        ("Bert", "", "reads a text in both directions"),
        ("ViT", "ImageClassification", "ViTForImageClassification .* is not a causal language model"),
        ("T5", "Seq2SeqLM", "T5ForConditionalGeneration .* is an encoder with a decoder"),
        ("Bart", "Seq2SeqLM", "BartForConditionalGeneration .* is an encoder with a decoder"),
    ],
    ids=["BERT", "BERT without head", "ViT", "T5", "BART"],
)
def test_what_is_not_a_causal_language_model(tmp_path: Path, family: str, auto: str, says: str) -> None:
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "d_model": 32,
             "num_attention_heads": 2, "d_ff": 64, "num_layers": 2, "num_heads": 2, "image_size": 32}  # fmt: skip
    cls = getattr(transformers, f"{family}Config")
    fields = vars(cls())
    config = cls(**{k: v for k, v in sizes.items() if k in fields or k in cls.attribute_map})
    make = getattr(transformers, f"AutoModelFor{auto}" if auto else "AutoModel")
    make.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=says):
        StreamedModel.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a":' * 100_000, "not valid JSON"),
        ("[]", "holds a list, not a JSON object"),
        ('{"pad_token_id": {}}', "transformers does not take it"),
    ],
    ids=["deep", "list", "type"],
)
def test_generation_defaults_that_transformers_refuses(build_model: Any, text: str, says: str) -> None:
    """transformers reads them with the model and artifacts carry them, so a folder that has them cannot be loaded."""
    folder = build_model()
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ArtifactError, match=rf"generation_config\.json: {says}"):
        StreamedModel.open(folder)
