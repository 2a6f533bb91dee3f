"""INT8 artifacts as TensorRT Edge-LLM 0.11 reads W8A8: ModelOpt's INT8 SmoothQuant layout, and what must come of it.

Of a linear with weight `[N, K]` the folder holds `weight` int8 `[N, K]`, `weight_scale` float32 `[N]`, `input_scale`
float32 `[1]` and `pre_quant_scale` float16 `[K]`, here ones: what could be smoothed is folded already. The exporter's
graph multiplies the inputs by the last, rounds them with one step, and multiplies by the weight, dequantized with a
scale a row. Source: tensorrt_edgellm 0.11.0, `models/linear.py` (INT8SQLinear) and `onnx/dynamo_translations.py`.

Shapes: N out_features, K in_features
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint import INDEX, Checkpoint
from compress.errors import UnsupportedError
from compress.files import json_bytes
from compress.formats import Stored, stored
from compress.shards import save_atomically

ALGORITHM = "W8A8_SQ_PER_CHANNEL"
QUANT_CONFIG = "hf_quant_config.json"


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for a model whose linears the exporter would read otherwise than they are."""
    if config["model_type"] == "phi3":
        raise UnsupportedError(
            f"{path}: phi3's fused projections are split for edge in INT4 only; quantize with `compress awq --bits 4 "
            "--sym`"
        )


def write_folder(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """ModelOpt's layout of the artifact's shards in `folder`, one shard in memory at a time; the names written."""
    source = stored(checkpoint)
    taken = source.taken()
    home = {layer: checkpoint.info(min(source.part_names(layer).values())).file for layer in source.layers}
    weight_map: dict[str, str] = {}
    for file in sorted({info.file for info in checkpoint.tensors.values()}):
        out = checkpoint.read(n for n, info in checkpoint.tensors.items() if info.file == file and n not in taken)
        for layer in (layer for layer, place in home.items() if place == file):
            out.update({f"{layer}.{leaf}": value for leaf, value in tensors(source, layer).items()})
        save_atomically(folder / file, out)
        weight_map.update(dict.fromkeys(out, file))
    if len(set(weight_map.values())) > 1:
        (folder / INDEX).write_bytes(json_bytes({"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}))
    said = {"quant_algo": ALGORITHM, "kv_cache_quant_algo": None, "exclude_modules": left_dense(source)}
    (folder / QUANT_CONFIG).write_bytes(json_bytes({"producer": {"name": "compress"}, "quantization": said}))
    return list(weight_map)


def left_dense(source: Stored) -> list[str]:
    """Linears that are not quantized. lm_head, which has no tensor where it is tied, would else be made of nothing."""
    tensors = source.checkpoint.tensors
    dense = {n.removesuffix(".weight") for n, i in tensors.items() if n.endswith(".weight") and len(i.shape) == 2}
    return sorted({"lm_head", *(name for name in dense if name not in source and "embed_tokens" not in name)})


def tensors(source: Stored, layer: str) -> dict[str, Tensor]:
    """A layer's tensors by leaf."""
    weight, static = source.weight(layer), source.static(layer)
    assert static is not None
    return {
        "weight": weight.signed_OI(),
        "weight_scale": weight.scale_OG.float().reshape(-1).contiguous(),
        "input_scale": static.scale.float(),
        "pre_quant_scale": torch.ones(weight.codes_OI.shape[1], dtype=torch.float16),
    }


def expected(checkpoint: Checkpoint) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every quantized layer's tensors, one layer at a time."""
    source = stored(checkpoint)
    for layer in source.layers:
        yield layer, tensors(source, layer)
