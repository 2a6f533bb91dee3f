"""A trained student as an artifact: an ordinary Hugging Face folder, read back and compared before it is published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.artifact import Manifest, carried_files, write_manifest
from compress.assemble import MAX_SHARD_BYTES
from compress.distill.models import LoadedModel, stored_state
from compress.distill.qad import quantized_layers
from compress.files import json_bytes, write_bytes_atomically
from compress.formats.format import parts_of
from compress.quantized import QuantizedWeight
from compress.shards import merge_shards, save_atomically, tensor_sha256
from compress.verify import verify_written

CURVE = "training.csv"
COLUMNS = ("step", "tokens", "loss", "divergence", "cross_entropy", "hidden", "rate", "norm")


def write_model(
    scratch: Path,
    staged: Path,
    loaded: LoadedModel,
    state: Mapping[str, Tensor],
    *,
    curve: str,
    manifest: Manifest,
) -> int:
    """Fill the empty folder `staged` with the student in the names and dtypes of the folder that it came from.

    state: by the model's names. Returns how many tensors were read back and compared. Raises ArtifactError when one
    differs.
    """
    tensors = stored_state(loaded, state)
    meant = {name: tensor_sha256(value) for name, value in tensors.items()}
    for layer, weight in quantized_layers(loaded, state).items():
        leaves, digests = _as_stored(loaded, layer, weight)
        tensors.update(leaves)
        meant.update(digests)
    part = scratch / "weights.safetensors"
    save_atomically(part, tensors)
    merge_shards([part], staged, max_shard_bytes=MAX_SHARD_BYTES)
    part.unlink()
    write_bytes_atomically(staged / "config.json", json_bytes(dict(loaded.checkpoint.config)))
    for path in carried_files(loaded.checkpoint.path):
        write_bytes_atomically(staged / path.name, path.read_bytes())
    write_bytes_atomically(staged / CURVE, curve.encode())
    verified = verify_written(staged, meant)
    write_manifest(staged, manifest)
    return verified


def _as_stored(loaded: LoadedModel, layer: str, weight: QuantizedWeight) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A trained layer's tensors in the folder's own format, and digests of what a second reader must find in them."""
    stored = loaded.stored
    assert stored.format is not None
    weight.check(layer)
    static = stored.static(layer)
    leaves = stored.format.tensors(weight, stored.scheme(layer), static)
    digests = {f"{layer}.{key}": tensor_sha256(value) for key, value in parts_of(weight, static).items()}
    return {f"{layer}.{leaf}": value for leaf, value in leaves.items()}, digests


def curve_csv(curve: list[dict[str, Any]], tokens_per_step: int) -> str:
    """The curve as CSV, every number as it was computed. Loss parts in nats a token."""
    lines = [",".join(COLUMNS)]
    for record in curve:
        row = {**record, "tokens": record["step"] * tokens_per_step}
        lines.append(",".join(repr(row[c]) for c in COLUMNS))
    return "\n".join(lines) + "\n"
