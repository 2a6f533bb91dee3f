"""Every stored tensor has a place, or the folder is refused by the tensor's name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import CompressError
from compress.model import StreamedModel

Q = "model.layers.0.self_attn.q_proj.weight"


def rewritten(folder: Path, **changes: Any) -> Path:
    """`folder` with tensors added, replaced or (None) taken away."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def configured(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "scaled fp8": (
        {Q: torch.ones(64, 64).to(torch.float8_e4m3fn), f"{Q}_scale_inv": torch.ones(1, 1)},
        f"{Q} is stored as F8_E4M3 and scaled by {Q}_scale_inv",
    ),
    "scaled int8": (
        {Q: torch.ones(64, 64, dtype=torch.int8), f"{Q}_scale": torch.ones(64, 1)},
        f"{Q} is stored as I8, but the model computes with floating-point",
    ),
    "gptq": (
        {
            Q: None,
            Q.replace("weight", "qweight"): torch.ones(8, 64, dtype=torch.int32),
            Q.replace("weight", "scales"): torch.ones(1, 64),
        },
        "qweight is stored as I32 and quantized, but config.json has no",
    ),
    "a bias that the config denies": (
        {Q.replace("weight", "bias"): torch.ones(64)},
        r"q_proj.bias \[64\] has no place in the model of type 'llama'",
    ),
    "a norm of another architecture": (
        {"model.layers.1.self_attn.q_norm.weight": torch.ones(16)},
        "self_attn.q_norm.weight .* has no place",
    ),
    "one block more": ({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}, "describes 2 blocks"),
    "a block that is cut": ({"model.layers.1.mlp.up_proj.weight": None}, "1.mlp.up_proj.weight is missing"),
    "no output matrix": ({"lm_head.weight": None}, "lm_head.weight is missing and config.json does not tie it"),
    "prefixes mixed": (
        {"model.layers.1.mlp.up_proj.weight": None, "layers.1.mlp.up_proj.weight": torch.ones(128, 64)},
        "layers.1.mlp.up_proj.weight belongs to the block whose other tensors are called model.layers.1",
    ),
    "twice": ({"layers.0.mlp.up_proj.weight": torch.ones(128, 64)}, "both are model.layers.0.mlp.up_proj.weight"),
    "quantized and not": (
        {Q.replace("weight", "qweight"): torch.ones(64, 8, dtype=torch.int32)},
        "qweight is stored as I32 and quantized, but config.json has no",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_by_name(build_model: Any, case: str) -> None:
    changes, says = CASES[case]
    with pytest.raises(CompressError, match=says):
        StreamedModel.open(rewritten(build_model(), **changes))


def test_what_old_versions_stored_is_no_obstacle(build_model: Any) -> None:
    """Rotary frequencies and causal masks were stored once; parts that the language model does not run may be there."""
    folder = rewritten(
        build_model(),
        **{
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
            "vision_tower.layers.0.fc1.weight": torch.ones(2, 2),
        },
    )
    StreamedModel.open(folder)


def test_fewer_layers_than_the_weights_have(build_model: Any) -> None:
    with pytest.raises(CompressError, match="holds model.layers.1.* but config.json describes 1 blocks"):
        StreamedModel.open(configured(build_model(), num_hidden_layers=1))


def test_the_base_of_another_task(build_model: Any) -> None:
    folder = configured(rewritten(build_model(), **{"lm_head.weight": None}), architectures=["LlamaModel"])
    with pytest.raises(CompressError, match="holds a LlamaModel, which lacks lm_head.weight"):
        StreamedModel.open(folder)
