"""Reading an artifact back with code that shares nothing with the writer, and comparing it with what was meant."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError
from compress.files import IO_THREADS
from compress.formats import Stored, stored
from compress.formats.second_reader import digest

_CHUNK_BYTES = 16 << 20
# What a digest calls the dtypes that an artifact holds, by their name in the file.
_KINDS = {
    "F64": "torch.float64", "F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16",
    "I64": "torch.int64", "I32": "torch.int32", "I16": "torch.int16", "I8": "torch.int8", "U8": "torch.uint8",
    "BOOL": "torch.bool", "F8_E4M3": "torch.float8_e4m3fn", "F8_E5M2": "torch.float8_e5m2",
}  # fmt: skip


def verify_written(folder: Path, meant: Mapping[str, str]) -> int:
    """Reopen every tensor of `folder` and compare with the digests in `meant`; returns how many were compared.

    meant maps a tensor's name, or for a quantized layer `layer.codes`, `layer.scales` and so on as
    `formats.format.parts_of` names them, to the digest of what the run computed. Raises ArtifactError at the first
    difference, and for tensors that are missing or that nobody meant to write. Tensors are compared side by side:
    unpacking and hashing leave the interpreter free.
    """
    written = stored(Checkpoint.open(folder))
    taken = written.taken()
    plain = [name for name in written.checkpoint.names() if name not in taken]
    work = [partial(_layer, written, layer) for layer in written.layers]
    work += [partial(_plain, written.checkpoint, name) for name in plain]
    seen: set[str] = set()
    with ThreadPoolExecutor(IO_THREADS) as pool:
        for found in pool.map(lambda one: one(), work):
            for key, digest in found.items():
                if meant.get(key) != digest:
                    what = "was not meant to be there" if key not in meant else "differs from what was computed"
                    raise ArtifactError(f"{folder}: {key} {what}; the disk or memory is faulty, run again")
                seen.add(key)
    missing = sorted(set(meant) - seen)
    if missing:
        raise ArtifactError(f"{folder}: {missing[0]} was not written; run again")
    return len(seen)


def _layer(written: Stored, layer: str) -> dict[str, str]:
    """Digests of what a second reader finds in a quantized layer."""
    return {f"{layer}.{key}": digest(again) for key, again in written.read_again(layer).items()}


def _plain(checkpoint: Checkpoint, name: str) -> dict[str, str]:
    """The digest of what a tensor holds that is stored as it is."""
    info = checkpoint.info(name)
    found = hashlib.sha256(f"{_KINDS[info.dtype]}{info.shape}".encode())
    with open(checkpoint.path / info.file, "rb") as f:  # in chunks: an embedding has gigabytes
        f.seek(info.offset)
        left = info.num_bytes
        while left:
            chunk = f.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise ArtifactError(f"{checkpoint.path / info.file}: ends inside {name}; run again")
            found.update(chunk)
            left -= len(chunk)
    return {name: found.hexdigest()}
