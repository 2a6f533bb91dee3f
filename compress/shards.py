"""Writing safetensors shards: atomically, in parts, and joined from the parts without holding them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from compress.checkpoint import INDEX, SINGLE, TensorInfo, bytes_of, dtype_name, read_header
from compress.files import (
    CHUNK_BYTES,
    IO_THREADS,
    copy_durably,
    copy_piece,
    fsync_path,
    json_bytes,
    write_bytes_atomically,
)


def save_atomically(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file that appears whole or not at all."""
    tmp = path.with_name(f".{path.name}.tmp")
    save_file({k: v.contiguous() for k, v in sorted(tensors.items())}, tmp, metadata={"format": "pt"})
    fsync_path(tmp)
    os.replace(tmp, path)
    fsync_path(path.parent)


def merge_shards(parts: list[Path], out: Path, *, max_shard_bytes: int, durable: bool = True) -> dict[str, str]:
    """Copy the tensors of `parts` (safetensors files) into Hugging Face shards in `out`; returns name -> file.

    Bytes are streamed, so memory does not depend on the shard's size. One shard is called
    `model.safetensors`; several get an index. Tensors keep the order of `parts`, then of name. durable: wait until they
    are on the disk; else the caller does, with `fsync_path`, before anyone relies on them.
    """
    sources = [(part, name, info) for part in parts for name, info in sorted(read_header(part).items())]
    shards: list[list[tuple[Path, str, TensorInfo]]] = [[]]
    filled = 0
    for part, name, info in sources:
        if shards[-1] and filled + info.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((part, name, info))
        filled += info.num_bytes
    weight_map: dict[str, str] = {}
    for number, members in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _stream_shard(out / file, members, durable)
        weight_map.update({name: file for _, name, _ in members})
    if len(shards) > 1:
        _write_index(out, weight_map, sum(info.num_bytes for _, _, info in sources))
    return weight_map


def link_shards(parts: list[Path], out: Path) -> dict[str, str]:
    """Make each of `parts` (safetensors files, on disk already) a Hugging Face shard in `out`; returns name -> file.

    Hard links: nothing is copied and no space is needed. Where the file system has none, copies.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        header = read_header(part)
        weight_map.update(dict.fromkeys(sorted(header), file))
        total += sum(info.num_bytes for info in header.values())
        try:
            os.link(part, out / file)
        except OSError:
            copy_durably(part, out / file)
    _write_index(out, weight_map, total)
    fsync_path(out)
    return weight_map


def _write_index(out: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_bytes_atomically(out / INDEX, json_bytes(index))


def _stream_shard(path: Path, members: list[tuple[Path, str, TensorInfo]], durable: bool) -> None:
    head = safetensors_head([(name, info.dtype, info.shape, info.num_bytes) for _, name, info in members])
    tmp = path.with_name(f".{path.name}.tmp")
    with open(tmp, "wb") as f:
        f.write(head)
        f.flush()
        pieces = []
        to = len(head)
        for part, _, info in members:
            for start in range(0, info.num_bytes, CHUNK_BYTES):
                size = min(CHUNK_BYTES, info.num_bytes - start)
                pieces.append((part, info.offset + start, f.fileno(), to + start, size))
            to += info.num_bytes
        f.truncate(to)
        with ThreadPoolExecutor(IO_THREADS) as pool:
            list(pool.map(lambda piece: copy_piece(*piece), pieces))
        if durable:
            os.fsync(f.fileno())
    os.replace(tmp, path)
    fsync_path(path.parent)


def save_in_parts(
    path: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...], parts: Iterable[Tensor]
) -> tuple[str, str]:
    """A safetensors file of one tensor, given as consecutive `parts` along its first axis; appears whole or not at all.

    One part is in memory at a time, and its bytes are hashed as they are written. Returns the file's sha256 and the
    tensor's, as `tensor_sha256` gives it.
    """
    size = math.prod(shape) * dtype.itemsize
    head = safetensors_head([(name, dtype_name(dtype), shape, size)])
    file, content = hashlib.sha256(head), hashlib.sha256(tensor_head(dtype, shape))
    tmp = path.with_name(f".{path.name}.tmp")
    with open(tmp, "wb") as f, ThreadPoolExecutor(2) as pool:
        f.write(head)
        for part in parts:
            assert part.dtype == dtype
            data = bytes_of(part.contiguous())
            hashed = [pool.submit(digest.update, data) for digest in (file, content)]
            f.write(data)
            for one in hashed:
                one.result()
        f.flush()
        assert f.tell() == len(head) + size, f"{name}: parts do not add up to {shape}"
        os.fsync(f.fileno())
    os.replace(tmp, path)
    fsync_path(path.parent)
    return file.hexdigest(), content.hexdigest()


def tensor_head(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    """What `tensor_sha256` puts before a tensor's bytes."""
    return f"{dtype}{tuple(shape)}".encode()


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 of a tensor's dtype, shape and bytes."""
    flat = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(tensor_head(flat.dtype, tuple(flat.shape)))
    digest.update(bytes_of(flat))
    return digest.hexdigest()


def safetensors_head(members: list[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Length and header of a safetensors file whose tensors (name, dtype, shape, bytes) lie in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, size in members:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
