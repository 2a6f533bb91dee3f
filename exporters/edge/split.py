"""Phi-3's fused projections as those of a Llama, which is what Edge-LLM's exporter reads: a cut between rows, exact."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.checkpoint import INDEX, Checkpoint
from compress.errors import ArtifactError
from compress.files import json_bytes
from compress.formats import Stored, stored
from compress.shards import save_atomically


def head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def parts(layer: str, size: int, config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """A layer's rows under the names that they get: (name, out_features); Phi-3's fused projections become several."""
    above, _, last = layer.rpartition(".")
    if config["model_type"] == "phi3" and last == "qkv_proj":
        dim = head_dim(config)
        query, key = int(config["num_attention_heads"]) * dim, int(config["num_key_value_heads"]) * dim
        return [(f"{above}.q_proj", query), (f"{above}.k_proj", key), (f"{above}.v_proj", key)]
    if config["model_type"] == "phi3" and last == "gate_up_proj":
        return [(f"{above}.gate_proj", size // 2), (f"{above}.up_proj", size // 2)]
    return [(layer, size)]


def check_heads(path: Path, name: str, rows: int, found: list[tuple[str, int]]) -> None:
    """Raise ArtifactError where a tensor's rows are not those that the config's heads make."""
    if sum(size for _, size in found) != rows:
        raise ArtifactError(f"{path}: {name} has {rows} rows, which do not fit its config's heads")


def write_shards(
    checkpoint: Checkpoint, folder: Path, tensors: Callable[[Stored, str], Iterable[tuple[str, Mapping[str, Tensor]]]]
) -> list[str]:
    """An artifact's shards in `folder` with fused projections cut, one shard in memory at a time; the names written.

    tensors: of a quantized layer, the tensors by leaf of each of the layers that its rows are exported as.
    """
    source = stored(checkpoint)
    taken = source.taken()
    # a quantized layer goes where the first of its tensors is
    home = {layer: checkpoint.info(min(source.part_names(layer).values())).file for layer in source.layers}
    weight_map: dict[str, str] = {}
    for file in sorted({info.file for info in checkpoint.tensors.values()}):
        out: dict[str, Tensor] = {}
        plain = [n for n, info in checkpoint.tensors.items() if info.file == file and n not in taken]
        for name, value in checkpoint.read(plain).items():
            layer, _, leaf = name.rpartition(".")
            cut = parts(layer, value.shape[0], checkpoint.config)
            check_heads(checkpoint.path, name, value.shape[0], cut)
            for (part, _), piece in zip(cut, value.split([size for _, size in cut]), strict=True):
                out[f"{part}.{leaf}"] = piece
        for layer in (layer for layer, place in home.items() if place == file):
            for part, found in tensors(source, layer):
                out.update({f"{part}.{leaf}": value for leaf, value in found.items()})
        save_atomically(folder / file, out)
        weight_map.update(dict.fromkeys(out, file))
    if len(set(weight_map.values())) > 1:
        (folder / INDEX).write_bytes(json_bytes({"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}))
    return list(weight_map)
