"""INT8 artifacts as TensorRT Edge-LLM 0.11 reads W8A8: ModelOpt's INT8 SmoothQuant layout, and what must come of it.

Of a linear with weight `[N, K]` the folder holds `weight` int8 `[N, K]`, `weight_scale` float32 `[N]`, `input_scale`
float32 `[1]` and `pre_quant_scale` float16 `[K]`, here ones: what could be smoothed is folded already. The exporter's
graph multiplies the inputs by the last, rounds them with one step, and multiplies by the weight, dequantized with a
scale a row. Source: tensorrt_edgellm 0.11.0, `models/linear.py` (INT8SQLinear) and `onnx/dynamo_translations.py`.

Shapes: N out_features, K in_features
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.files import json_bytes
from compress.formats import Stored, stored
from exporters.edge.split import check_heads, parts, write_shards

ALGORITHM = "W8A8_SQ_PER_CHANNEL"
QUANT_CONFIG = "hf_quant_config.json"


def write_folder(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """ModelOpt's layout of the artifact's shards in `folder`, one shard in memory at a time; the names written."""
    written = write_shards(checkpoint, folder, tensors)
    said = {"quant_algo": ALGORITHM, "kv_cache_quant_algo": None, "exclude_modules": left_dense(stored(checkpoint))}
    (folder / QUANT_CONFIG).write_bytes(json_bytes({"producer": {"name": "compress"}, "quantization": said}))
    return written


def left_dense(source: Stored) -> list[str]:
    """Linears that are not quantized. lm_head, which has no tensor where it is tied, would else be made of nothing."""
    config, tensors = source.checkpoint.config, source.checkpoint.tensors
    dense = {n.removesuffix(".weight"): i for n, i in tensors.items() if n.endswith(".weight") and len(i.shape) == 2}
    kept = {name: info for name, info in dense.items() if name not in source and "embed_tokens" not in name}
    return sorted({"lm_head", *(part for name, i in kept.items() for part, _ in parts(name, i.shape[0], config))})


def tensors(source: Stored, layer: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors by leaf of a layer, or of each of those that its rows are exported as."""
    weight, static = source.weight(layer), source.static(layer)
    assert static is not None
    signed_OI, scale_O = weight.signed_OI(), weight.scale_OG.float().reshape(-1)
    cut = parts(layer, len(signed_OI), source.checkpoint.config)
    check_heads(source.checkpoint.path, layer, len(signed_OI), cut)
    start = 0
    for part, size in cut:
        rows = slice(start, start + size)
        start += size
        yield (
            part,
            {
                "weight": signed_OI[rows].contiguous(),
                "weight_scale": scale_O[rows].contiguous(),
                "input_scale": static.scale.float().clone(),
                "pre_quant_scale": torch.ones(signed_OI.shape[1], dtype=torch.float16),
            },
        )


def expected(checkpoint: Checkpoint) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every quantized layer's tensors under the name that the export must have, one layer at a time."""
    source = stored(checkpoint)
    for layer in source.layers:
        yield from tensors(source, layer)
