"""The artifact in ModelOpt's W4A16_AWQ layout, for readers of `hf_quant_config.json`.

Those readers believe that file before config.json and then expect ModelOpt's own tensors (TensorRT-LLM,
`quantization/modelopt_config.py`: the file form is authoritative). So it must not lie beside AutoAWQ's: given such a
folder, TensorRT Edge-LLM 0.11 skipped every quantized tensor and exported zeros (measured: "Loaded 14 tensors, skipped
126"). It lies in a folder of its own, with the same codes and scales in ModelOpt's layout; Edge-LLM 0.11 loads all of
that one, and its graph then holds the same bytes as from the AutoAWQ folder (measured). For a linear `[O, I]`:

    weight           uint8    [O / 2, I]    low nibble: row 2r, high nibble: row 2r + 1; code - 8 in two's complement
    weight_scale     float16  [O, I / group_size]
    pre_quant_scale  float16  [I]           all 1: our smoothing is folded into the layer before

Source: NVIDIA Model-Optimizer, `modelopt/torch/export/quant_utils.py` (`pack_int4_in_uint8`), and what TensorRT-LLM's
`W4A16_AWQ_LinearMethod` reads. The layout has no zero points, so only symmetric codes can be written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.artifact import carried_files
from compress.assemble import MAX_SHARD_BYTES
from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError
from compress.files import json_bytes, write_bytes_atomically
from compress.formats import Stored
from compress.quantized import QuantizedWeight
from compress.shards import merge_shards, save_atomically

QUANT_CONFIG = "hf_quant_config.json"


def tensors(q: QuantizedWeight) -> dict[str, Tensor]:
    """The layout's tensors of one layer, keyed `weight`, `weight_scale`, `pre_quant_scale`. Symmetric codes only."""
    assert q.scheme.symmetric or bool((q.zero_point_OG == q.scheme.symmetric_zero_point).all())
    signed = (q.codes_OI.to(torch.int16) - q.scheme.symmetric_zero_point) & 0xF
    return {
        "weight": (signed[0::2] | (signed[1::2] << 4)).to(torch.uint8),
        "weight_scale": q.scale_OG.contiguous(),
        "pre_quant_scale": torch.ones(q.codes_OI.shape[1], dtype=torch.float16),
    }


def dequantize(parts: Mapping[str, Tensor]) -> Tensor:
    """The float32 weight `[O, I]` that a reader computes with; written from the layout's description."""
    packed = parts["weight"].to(torch.int16)
    rows = torch.stack([packed & 0xF, packed >> 4], dim=1).reshape(-1, packed.shape[1])
    codes = torch.where(rows > 7, rows - 16, rows).float()
    scale = parts["weight_scale"].float()
    return codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1) * parts["pre_quant_scale"].float()


def quant_config(group_size: int, exclude: list[str]) -> dict[str, Any]:
    """`hf_quant_config.json`, in the nested shape that ModelOpt writes up to 0.43 and every reader takes."""
    return {
        "producer": {"name": "modelopt", "version": "0.43.0"},
        "quantization": {
            "quant_algo": "W4A16_AWQ",
            "kv_cache_quant_algo": None,
            "group_size": group_size,
            "has_zero_point": False,
            "pre_quant_scale": True,
            "exclude_modules": exclude,
        },
    }


def write(artifact: Stored, out: Path, on_layer: Callable[[int, int], None]) -> int:
    """Write the folder `out` from an artifact of symmetric INT4 codes and read it back; returns the layers compared.

    Raises ArtifactError when a layer read back is not what the artifact holds.
    """
    checkpoint, layers, taken = artifact.checkpoint, artifact.layers, artifact.taken()
    out.mkdir()
    parts = out / ".parts"
    parts.mkdir()
    pieces = []
    for number, layer in enumerate(layers):
        pieces.append(parts / f"{number:06d}.safetensors")
        packed = tensors(artifact.weight(layer))
        save_atomically(pieces[-1], {f"{layer}.{name}": value for name, value in packed.items()})
        on_layer(number + 1, len(layers))
    for number, name in enumerate(n for n in checkpoint.names() if n not in taken):
        pieces.append(parts / f"rest-{number:06d}.safetensors")
        save_atomically(pieces[-1], {name: checkpoint.tensor(name)})
    merge_shards(pieces, out, max_shard_bytes=MAX_SHARD_BYTES)
    for piece in pieces:
        piece.unlink()
    parts.rmdir()
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    write_bytes_atomically(out / "config.json", json_bytes(config))
    exclude = sorted(checkpoint.config["quantization_config"].get("modules_to_not_convert") or [])
    scheme = artifact.plan.only().weight
    assert scheme is not None
    write_bytes_atomically(out / QUANT_CONFIG, json_bytes(quant_config(scheme.group_size, exclude)))
    for path in carried_files(checkpoint.path):
        write_bytes_atomically(out / path.name, path.read_bytes())
    _verify(artifact, Checkpoint.open(out), taken)
    return len(layers)


def _verify(artifact: Stored, made: Checkpoint, taken: set[str]) -> None:
    for layer in artifact.layers:
        parts = {s: made.tensor(f"{layer}.{s}") for s in ("weight", "weight_scale", "pre_quant_scale")}
        if not torch.equal(dequantize(parts), artifact.dense(layer)):
            raise ArtifactError(f"{made.path}: {layer} read back is not the artifact's; the disk is faulty, run again")
    source = artifact.checkpoint
    for name in source.names():
        if name not in taken and not torch.equal(source.tensor(name), made.tensor(name)):
            raise ArtifactError(f"{made.path}: {name} read back is not the artifact's; the disk is faulty, run again")
