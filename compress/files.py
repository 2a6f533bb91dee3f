"""Files as bytes: read as JSON, hashed, copied and written so that a name never holds half a file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from compress.errors import ArtifactError

CHUNK_BYTES = 16 << 20
# Threads that read, copy or hash files; a disk wants several requests at once, and a core hashes 1 to 2 GB/s.
IO_THREADS = min(8, os.cpu_count() or 1)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ArtifactError says which file is absent or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file; {path.parent} is not a complete model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ArtifactError(f"{path}: not valid JSON ({e}); fetch the file again") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: holds a {type(value).__name__}, not a JSON object; fetch the file again")
    return value


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes. Releases the interpreter lock, so it may run in a thread."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def fsync_dir(path: Path) -> None:
    """Make a rename inside `path` durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """`path` holds all of `data` or what it held before; never half."""
    tmp = path.with_name(f".{path.name}.tmp")
    with open(tmp, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)
    fsync_dir(path.parent)


def json_bytes(value: Any) -> bytes:
    """Stable, readable JSON: insertion order kept, newline at the end, NaN refused."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def copy_durably(source: Path, target: Path) -> None:
    with open(source, "rb") as read, open(target, "wb") as write:
        shutil.copyfileobj(read, write, CHUNK_BYTES)
        write.flush()
        os.fsync(write.fileno())


def copy_piece(source: Path, begin: int, target: int, to: int, size: int) -> None:
    """`size` bytes of `source` from byte `begin` to byte `to` of the open file `target`."""
    data = bytearray(size)
    read_into(source, begin, memoryview(data))
    left = memoryview(data)
    while left:
        written = os.pwrite(target, left, to)
        to += written
        left = left[written:]


def read_into(path: Path, begin: int, view: memoryview) -> None:
    """Fill `view` with the bytes of `path` from `begin` on. Leaves the interpreter free while it reads."""
    try:
        with open(path, "rb", buffering=0) as f:
            f.seek(begin)
            while view:
                count = f.readinto(view)
                if not count:
                    raise ArtifactError(f"{path}: ends before byte {begin + len(view)}; fetch the file again")
                begin += count
                view = view[count:]
    except OSError as e:
        raise ArtifactError(f"{path}: cannot be read ({e}); fetch the shard again") from e
