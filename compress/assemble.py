"""From finished blocks to a finished artifact: the tensors around the blocks, shards, config, manifest, verification.

Everything is made inside the working folder, read back and compared, and only then renamed to its final place.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.artifact import Manifest, carried_files, write_manifest
from compress.files import file_sha256, json_bytes, read_json, write_bytes_atomically
from compress.journal import Journal, publish
from compress.model import StreamedModel
from compress.shards import link_shards, merge_shards, save_atomically, save_in_parts, tensor_sha256
from compress.verify import verify_written

MAX_SHARD_BYTES = 5_000_000_000
PUBLISHING = "publishing"


# Tensors around the blocks that are converted and written at once: the embedding and the output matrix, gigabytes each.
REST_THREADS = 2
PART_BYTES = 32 << 20


def write_rest(journal: Journal, model: StreamedModel, convert: Callable[[Tensor, str], Tensor]) -> list[Path]:
    """Store every tensor that belongs to no block, converted; one file each, a part of it in memory at a time."""
    prefixes = tuple(model.block_prefix(i) for i in range(model.num_blocks))
    names = [n for n in model.checkpoint.names() if not n.startswith(prefixes)]
    paths = [journal.folder / f"rest-{number:05d}.safetensors" for number in range(len(names))]

    def write(name: str, path: Path) -> None:
        record = path.with_suffix(".json")
        if record.exists() and path.exists() and file_sha256(path) == read_json(record)["sha256"]:
            return
        info = model.checkpoint.info(name)
        rows = max(1, info.shape[0] * PART_BYTES // max(1, info.num_bytes)) if info.shape else 1
        if info.shape and info.shape[0]:
            parts = (
                convert(model.checkpoint.slice(name, start, min(start + rows, info.shape[0])), name)
                for start in range(0, info.shape[0], rows)
            )
            first = next(parts)
            stored, content = save_in_parts(path, name, first.dtype, info.shape, chain([first], parts))
        else:  # a scalar, or nothing at all
            value = convert(model.checkpoint.tensor(name), name)
            save_atomically(path, {name: value})
            stored, content = file_sha256(path), tensor_sha256(value)
        write_bytes_atomically(record, json_bytes({"sha256": stored, "meant": {name: content}}))

    with ThreadPoolExecutor(REST_THREADS) as pool:
        list(pool.map(write, names, paths))
    return paths


def assemble(
    journal: Journal,
    model: StreamedModel,
    out: Path,
    *,
    rest: list[Path],
    config: Mapping[str, Any],
    manifest: Manifest,
) -> int:
    """Merge the journal's tensors into `out`, write what goes with them, verify, publish.

    Returns how many tensors were read back and compared. Raises ArtifactError, leaving `out` as it was, when one
    differs.
    """
    staged = journal.folder / "final"
    if staged.exists():
        shutil.rmtree(staged)
    staged.mkdir()
    parts = rest + [journal.tensors_path(i) for i in range(model.num_blocks)]
    if sum(part.stat().st_size for part in parts) > MAX_SHARD_BYTES:
        link_shards(parts, staged)  # what would be several shards anyhow becomes one a block, without a copy
    else:
        merge_shards(parts, staged, max_shard_bytes=MAX_SHARD_BYTES)
    write_bytes_atomically(staged / "config.json", json_bytes(config))
    for path in carried_files(model.checkpoint.path):
        write_bytes_atomically(staged / path.name, path.read_bytes())
    write_manifest(staged, manifest)
    meant: dict[str, str] = {}
    for record in [
        *(journal.record_path(i) for i in range(model.num_blocks)),
        *(p.with_suffix(".json") for p in rest),
    ]:
        meant.update(read_json(record)["meant"])
    compared = verify_written(staged, meant)
    write_bytes_atomically(journal.folder / PUBLISHING, b"")
    publish(staged, out)
    journal.close()
    return compared


def was_published(folder: Path, out: Path) -> bool:
    """Whether an earlier run was killed after its artifact was in place but before its working folder was removed."""
    return out.exists() and (folder / PUBLISHING).exists() and not (folder / "final").exists()
