"""From finished blocks to a finished artifact: the tensors around the blocks, shards, config, manifest, verification.

Everything is made inside the scratch folder, read back and compared; `compress.output` then gives it its place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.artifact import Manifest, carried_files, file_hashes, names_in, write_manifest
from compress.background import meanwhile
from compress.errors import ArtifactError
from compress.files import file_sha256, fsync_path, json_bytes, write_bytes_atomically
from compress.journal import Journal, read_record, write_record
from compress.model import StreamedModel
from compress.shards import link_shards, merge_shards, save_atomically, save_in_parts, tensor_sha256
from compress.verify import ReadBack, stamp_of, verify_written

MAX_SHARD_BYTES = 5_000_000_000

# Tensors around the blocks that are converted and written at once: the embedding and the output matrix, gigabytes each.
REST_THREADS = 2
PART_BYTES = 32 << 20


Cut = tuple[Tensor | None, ...]


def nothing_cut(name: str, shape: tuple[int, ...]) -> Cut:
    """Keep every index of every axis."""
    return (None,) * len(shape)


def write_rest(
    journal: Journal,
    model: StreamedModel,
    convert: Callable[[Tensor, str], Tensor],
    cut: Callable[[str, tuple[int, ...]], Cut] = nothing_cut,
    made: Collection[str] = (),
) -> list[Path]:
    """Store every tensor that belongs to no block, cut and converted; one file each, a part of it in memory at a time.

    made: tensors that a stage makes something else of. cut: for each axis of a tensor the indices that are kept (int64,
    ascending), None for all.
    """
    prefixes = tuple(model.block_prefix(i) for i in range(model.num_blocks))
    names = [n for n in model.checkpoint.names() if not n.startswith(prefixes) and n not in made]
    paths = [journal.folder / f"rest-{number:05d}.safetensors" for number in range(len(names))]

    def write(name: str, path: Path) -> None:
        done = read_record(path.with_suffix(".json"), journal.run, path)
        if done is not None and done["name"] == name:
            journal.kept(path)
            return
        info = model.checkpoint.info(name)
        rows = max(1, info.shape[0] * PART_BYTES // max(1, info.num_bytes)) if info.shape else 1
        if info.shape and info.shape[0]:
            kept = cut(name, info.shape)
            shape = tuple(size if axis is None else len(axis) for size, axis in zip(info.shape, kept, strict=True))
            parts = (
                convert(_kept(model.checkpoint.slice(name, start, min(start + rows, info.shape[0])), start, kept), name)
                for start in range(0, info.shape[0], rows)
            )
            first = next(parts)
            stored, content = save_in_parts(path, name, first.dtype, shape, chain([first], parts))
        else:  # a scalar, or nothing at all
            value = convert(model.checkpoint.tensor(name), name)
            save_atomically(path, {name: value})
            stored, content = file_sha256(path), tensor_sha256(value)
        write_record(path.with_suffix(".json"), journal.run, {"name": name, "sha256": stored, "meant": {name: content}})
        journal.kept(path)

    with ThreadPoolExecutor(REST_THREADS) as pool:
        list(pool.map(write, names, paths))
    return paths


def _kept(part: Tensor, start: int, kept: Cut) -> Tensor:
    """The kept indices of rows `start` and on of a tensor."""
    rows = kept[0]
    if rows is not None:
        part = part[rows[(rows >= start) & (rows < start + len(part))] - start]
    for axis, indices in enumerate(kept[1:], 1):
        if indices is not None:
            part = part.index_select(axis, indices)
    return part


def is_linked(num_bytes: int) -> bool:
    """Whether parts of so many bytes become an artifact's files as they are, without a copy: what would be several
    shards anyhow becomes one a block. Fewer are joined to one file."""
    return num_bytes > MAX_SHARD_BYTES


def assemble(
    journal: Journal,
    model: StreamedModel,
    staged: Path,
    *,
    parts: list[Path],
    config: Mapping[str, Any],
    manifest: Manifest,
    read: Collection[ReadBack] = (),
) -> int:
    """Merge the tensors of `parts`, each beside its record, into the empty folder `staged`, write what goes with them,
    verify, sign.

    read: what was read back of `parts` already; those that become files of the folder as they are, and were not written
    to since, are not read again. Returns how many tensors were read back and compared. Raises ArtifactError when one
    differs.
    """
    merged: set[str] = set()
    if is_linked(sum(part.stat().st_size for part in parts)):
        link_shards(parts, staged)
    else:
        merged.update(merge_shards(parts, staged, max_shard_bytes=MAX_SHARD_BYTES, durable=False).values())
    write_bytes_atomically(staged / "config.json", json_bytes(config))
    for path in carried_files(model.checkpoint.path):
        write_bytes_atomically(staged / path.name, path.read_bytes())
    meant: dict[str, str] = {}
    for part in parts:
        record = read_record(part.with_suffix(".json"), journal.run)
        if record is None:
            raise ArtifactError(f"{part}: its record was lost while the run worked; run the same command again")
        meant.update(record["meant"])
    by_stamp = {one.stamp: one for one in read}
    names = names_in(staged)
    known = {name: by_stamp[stamp] for name in names if (stamp := stamp_of(staged / name)) in by_stamp}
    new = [name for name in names if name not in known]
    # The manifest's hashes and the comparison read the same bytes side by side, so that the disk gives them once; and
    # it takes what was merged meanwhile.
    with meanwhile(partial(_to_disk, staged, merged)) as kept, meanwhile(partial(file_hashes, staged, new)) as hashed:
        compared = verify_written(staged, meant, known)
    kept.result()
    write_manifest(staged, manifest, {**hashed.result(), **{name: one.sha256 for name, one in known.items()}})
    return compared


def _to_disk(folder: Path, names: Collection[str]) -> None:
    for name in sorted(names):
        fsync_path(folder / name)
