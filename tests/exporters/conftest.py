"""Small artifacts in the AutoAWQ layout, quantized by plain rounding: what an exporter reads, made in a second."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import numerics
from compress.formats import awq_gemm
from compress.quantized import QuantizedWeight
from compress.scheme import Scheme


@pytest.fixture
def awq_folder(build_model: Callable[..., Path]) -> Callable[..., Path]:
    """Builds a model of a family and rounds its blocks' projections to INT4; returns its folder."""

    def make(family: str = "Llama", *, symmetric: bool = True, keep: tuple[str, ...] = (), **changes: Any) -> Path:
        sizes = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64, **changes}
        folder = build_model(family, dtype="float16", **sizes)
        scheme = Scheme(group_size=128, symmetric=symmetric)
        tensors: dict[str, torch.Tensor] = {}
        for name, value in load_file(folder / "model.safetensors").items():
            layer = name.removesuffix(".weight")
            if ".layers." not in name or value.ndim != 2 or layer.endswith(keep or ("none",)):
                tensors[name] = value
                continue
            groups = numerics.to_groups(value.float(), scheme)
            scale, zero = numerics.scale_and_zero(*numerics.range_of(groups), scheme)
            codes = numerics.quantize(groups, scale, zero, scheme)
            packed = awq_gemm.tensors(QuantizedWeight.from_parts(codes, scale, zero, scheme))
            tensors.update({f"{layer}.{suffix}": part for suffix, part in packed.items()})
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = awq_gemm.quantization_config(scheme, ["lm_head", *keep])
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make
