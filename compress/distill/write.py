"""A trained student as an artifact: an ordinary Hugging Face folder, read back and compared before it is published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.artifact import Manifest, carried_files, write_manifest
from compress.assemble import MAX_SHARD_BYTES
from compress.distill.models import LoadedModel, stored_state
from compress.files import json_bytes, write_bytes_atomically
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
    part = scratch / "weights.safetensors"
    save_atomically(part, tensors)
    merge_shards([part], staged, max_shard_bytes=MAX_SHARD_BYTES)
    part.unlink()
    write_bytes_atomically(staged / "config.json", json_bytes(dict(loaded.checkpoint.config)))
    for path in carried_files(loaded.checkpoint.path):
        write_bytes_atomically(staged / path.name, path.read_bytes())
    write_bytes_atomically(staged / CURVE, curve.encode())
    verified = verify_written(staged, {name: tensor_sha256(value) for name, value in tensors.items()})
    write_manifest(staged, manifest)
    return verified


def curve_csv(curve: list[dict[str, Any]], tokens_per_step: int) -> str:
    """The curve as CSV, every number as it was computed. Loss parts in nats a token."""
    lines = [",".join(COLUMNS)]
    for record in curve:
        row = {**record, "tokens": record["step"] * tokens_per_step}
        lines.append(",".join(repr(row[c]) for c in COLUMNS))
    return "\n".join(lines) + "\n"
