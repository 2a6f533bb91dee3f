"""Phi-3's fused projections as those of a Llama, which is what Edge-LLM's exporter reads: a cut between rows, exact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import ArtifactError


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
