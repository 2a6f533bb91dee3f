"""Reading an artifact back with code that shares nothing with the writer, and comparing it with what was meant.

A file that enters the artifact as it is can be read back as soon as it is written (`read_back`); the comparison, of the
whole folder, is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from compress.checkpoint import Checkpoint, read_header
from compress.errors import ArtifactError
from compress.files import IO_THREADS, file_sha256
from compress.formats import Stored, stored
from compress.formats.second_reader import digest
from compress.plan import LayerScheme

_CHUNK_BYTES = 16 << 20
# What a digest calls the dtypes that an artifact holds, by their name in the file.
_KINDS = {
    "F64": "torch.float64", "F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16",
    "I64": "torch.int64", "I32": "torch.int32", "I16": "torch.int16", "I8": "torch.int8", "U8": "torch.uint8",
    "BOOL": "torch.bool", "F8_E4M3": "torch.float8_e4m3fn", "F8_E5M2": "torch.float8_e5m2",
}  # fmt: skip


# Threads that read one file back while blocks are computed: no more, since those need the cores as well.
_BESIDE_THREADS = 4

Stamp = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class ReadBack:
    """What a file holds: digests by layer or tensor, as `verify_written` compares them; the file's sha256.

    schemes: of its quantized layers, which decide how they are read. stamp: the file's, by which it is known again.
    """

    stamp: Stamp
    sha256: str
    digests: Mapping[str, Mapping[str, str]]
    schemes: Mapping[str, LayerScheme]


def stamp_of(path: Path) -> Stamp:
    """Device, inode, size and modification time of a file: the same for a hard link, another after every change."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def read_back(path: Path, config: Mapping[str, Any]) -> ReadBack:
    """Read one safetensors file, on disk, of what will be a folder with this config.json. Takes `_BESIDE_THREADS`."""
    stamp = stamp_of(path)
    written = stored(Checkpoint(path=path.parent, config=config, tensors=read_header(path)))
    work = _work(written)
    with ThreadPoolExecutor(_BESIDE_THREADS) as pool:
        sha256 = pool.submit(file_sha256, path)
        digests = dict(zip(work, pool.map(lambda one: one(), work.values()), strict=True))
        return ReadBack(stamp=stamp, sha256=sha256.result(), digests=digests, schemes=dict(written.plan))


class ReadingBack:
    """Reads files back in a thread, one after the other, while others are made. Use as a context manager.

    config: what config.json will say.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="read-back")
        self.taken: list[Future[ReadBack]] = []

    def __enter__(self) -> ReadingBack:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def take(self, path: Path) -> None:
        """Read this file as well, which is on disk and stays as it is."""
        self.taken.append(self.pool.submit(read_back, path, self.config))

    def found(self) -> list[ReadBack]:
        """What was found in every file taken, once all are read; raises what went wrong."""
        return [one.result() for one in self.taken]


def verify_written(folder: Path, meant: Mapping[str, str], known: Mapping[str, ReadBack] | None = None) -> int:
    """Reopen every tensor of `folder` and compare with the digests in `meant`; returns how many were compared.

    meant maps a tensor's name, or for a quantized layer `layer.codes`, `layer.scales` and so on as
    `formats.format.parts_of` names them, to the digest of what the run computed. known: what was read back before of
    files of the folder, by their names; that is not read again. Raises ArtifactError at the first difference, and for
    tensors that are missing or that nobody meant to write. Tensors are compared side by side: unpacking and hashing
    leave the interpreter free.
    """
    written = stored(Checkpoint.open(folder))
    work = _work(written, known or {})
    seen: set[str] = set()
    with ThreadPoolExecutor(IO_THREADS) as pool:
        for found in pool.map(lambda one: one(), work.values()):
            for key, digest in found.items():
                if meant.get(key) != digest:
                    what = "was not meant to be there" if key not in meant else "differs from what was computed"
                    raise ArtifactError(f"{folder}: {key} {what}; the disk or memory is faulty, run again")
                seen.add(key)
    missing = sorted(set(meant) - seen)
    if missing:
        raise ArtifactError(f"{folder}: {missing[0]} was not written; run again")
    return len(seen)


def _work(written: Stored, known: Mapping[str, ReadBack] | None = None) -> dict[str, Callable[[], Mapping[str, str]]]:
    """What gives the digests of each layer, then of each tensor that is stored as it is."""
    taken = written.taken()
    plain = [name for name in written.checkpoint.names() if name not in taken]
    work: dict[str, Callable[[], Mapping[str, str]]] = {n: partial(_layer, written, n) for n in written.layers}
    work |= {name: partial(_plain, written.checkpoint, name) for name in plain}
    for name in work if known else []:
        parts = written.part_names(name).values() if name in written else [name]
        files = {written.checkpoint.info(part).file for part in parts}
        before = known.get(files.pop()) if known and len(files) == 1 else None
        if before is not None and name in before.digests and before.schemes.get(name) == written.plan.get(name):
            work[name] = partial(before.digests.__getitem__, name)
    return work


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
