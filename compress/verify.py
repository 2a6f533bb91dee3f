"""Reading an artifact back with code that shares nothing with the writer, and comparing it with what was meant.

Written in numpy from the format's description, one nibble at a time, on purpose: a mistake in the packing code
cannot also be here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError
from compress.files import IO_THREADS
from compress.formats.second_reader import unpack_awq

_CHUNK_BYTES = 16 << 20
# What a digest calls the dtypes that an artifact holds, by their name in the file.
_KINDS = {
    "F64": "torch.float64", "F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16",
    "I64": "torch.int64", "I32": "torch.int32", "I16": "torch.int16", "I8": "torch.int8", "U8": "torch.uint8",
    "BOOL": "torch.bool", "F8_E4M3": "torch.float8_e4m3fn", "F8_E5M2": "torch.float8_e5m2",
}  # fmt: skip


def verify_written(folder: Path, meant: Mapping[str, str]) -> int:
    """Reopen every tensor of `folder` and compare with the digests in `meant`; returns how many were compared.

    meant maps a tensor's name, or for a packed layer `layer.codes`, `layer.scales` and `layer.zero_points` in the
    `[out_features, ...]` orientation, to the digest of what the run computed. Raises ArtifactError at the first
    difference, and for tensors that are missing or that nobody meant to write. Tensors are compared side by side:
    unpacking and hashing leave the interpreter free.
    """
    checkpoint = Checkpoint.open(folder)
    seen: set[str] = set()
    with ThreadPoolExecutor(IO_THREADS) as pool:
        for key, found in pool.map(lambda name: _found(checkpoint, name, meant), checkpoint.names()):
            if meant.get(key) != found:
                what = "was not meant to be there" if key not in meant else "differs from what was computed"
                raise ArtifactError(f"{folder}: {key} {what}; the disk or memory is faulty, run again")
            seen.add(key)
    missing = sorted(set(meant) - seen)
    if missing:
        raise ArtifactError(f"{folder}: {missing[0]} was not written; run again")
    return len(seen)


def _found(checkpoint: Checkpoint, name: str, meant: Mapping[str, str]) -> tuple[str, str]:
    """What a stored tensor is called in `meant`, and the digest of what it holds."""
    layer, _, leaf = name.rpartition(".")
    if leaf == "qweight":
        return f"{layer}.codes", _digest("torch.uint8", unpack_awq(checkpoint.tensor(name).numpy()).T)
    if leaf == "qzeros":
        return f"{layer}.zero_points", _digest("torch.uint8", unpack_awq(checkpoint.tensor(name).numpy()).T)
    if leaf == "scales" and name in meant:
        return name, _digest("torch.float16", np.ascontiguousarray(checkpoint.tensor(name).numpy().T))
    info = checkpoint.info(name)
    digest = hashlib.sha256(f"{_KINDS[info.dtype]}{info.shape}".encode())
    with open(checkpoint.path / info.file, "rb") as f:  # in chunks: an embedding has gigabytes
        f.seek(info.offset)
        left = info.num_bytes
        while left:
            chunk = f.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise ArtifactError(f"{checkpoint.path / info.file}: ends inside {name}; run again")
            digest.update(chunk)
            left -= len(chunk)
    return name, digest.hexdigest()


def _digest(kind: str, value: np.ndarray) -> str:
    digest = hashlib.sha256(f"{kind}{tuple(value.shape)}".encode())
    digest.update(value.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
