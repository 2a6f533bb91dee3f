"""Files as bytes: read as JSON, hashed, copied and written so that a name never holds half a file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from compress.errors import ArtifactError, reason

CHUNK_BYTES = 16 << 20
# Threads that read, copy or hash files; a disk wants several requests at once, and a core hashes 1 to 2 GB/s.
IO_THREADS = min(8, os.cpu_count() or 1)
# No config, index or manifest comes near it; a sparse file of a terabyte must not be read into memory.
MAX_JSON_BYTES = 1 << 28
_KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)  # fmt: skip


def check_file(path: Path) -> int:
    """Bytes of a regular file, or of the one that a link leads to; before anything is opened.

    A pipe never answers and a device never ends. FileNotFoundError when there is nothing at all; ArtifactError for what
    is not a file or cannot be reached.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        if not path.is_symlink():
            raise
        raise ArtifactError(
            f"{path} is a link to {os.readlink(path)}, which is not there; fetch the file again"
        ) from None
    except (OSError, ValueError) as e:
        raise ArtifactError(f"{path}: cannot be read ({reason(e)}); fetch the file again") from None
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for test, name in _KINDS if test(found.st_mode)), "something else")
        raise ArtifactError(f"{path} is {kind}, not a file; put the model's own file there")
    return found.st_size


def is_file(path: Path) -> bool:
    """Whether there is a regular file; False as well for what cannot be reached."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def open_file(path: Path) -> BinaryIO:
    """A regular file, open for reading bytes. See `check_file`."""
    check_file(path)
    return open(path, "rb", buffering=0)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ArtifactError says which file is absent or broken."""
    try:
        size = check_file(path)
        if size > MAX_JSON_BYTES:
            raise ArtifactError(f"{path}: {size} bytes are too many for a JSON file of a model; fetch the file again")
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file; {path.parent} is not a complete model folder") from None
    except (ValueError, RecursionError) as e:  # also digits without end, and what is not UTF-8
        raise ArtifactError(f"{path}: not valid JSON ({reason(e)}); fetch the file again") from None
    except OSError as e:
        raise ArtifactError(f"{path}: cannot be read ({reason(e)}); make the file readable") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: holds a {type(value).__name__}, not a JSON object; fetch the file again")
    if not _encodes(value):
        raise ArtifactError(f"{path}: holds half of a surrogate pair, which is not text; fetch the file again")
    return value


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(object_pairs_hook=)`: an object whose keys are all different; else ValueError."""
    value = dict(pairs)
    if len(value) != len(pairs):
        names = sorted(name for name, _ in pairs)
        twice = next(a for a, b in zip(names, names[1:], strict=False) if a == b)
        raise ValueError(f"{twice[:80]!r} stands there twice")
    for name in value:
        name.encode()  # half of a surrogate pair is a UnicodeEncodeError, a ValueError
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def _encodes(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes. Releases the interpreter lock, so it may run in a thread."""
    digest = hashlib.sha256()
    with open_file(path) as f:
        while chunk := f.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def fsync_path(path: Path) -> None:
    """Return once a file's bytes, or the names in a folder, are on the disk, whoever wrote them."""
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
    fsync_path(path.parent)


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
        with open_file(path) as f:
            f.seek(begin)
            while view:
                count = f.readinto(view)  # type: ignore[attr-defined]
                if not count:
                    raise ArtifactError(f"{path}: ends before byte {begin + len(view)}; fetch the file again")
                begin += count
                view = view[count:]
    except OSError as e:
        raise ArtifactError(f"{path}: cannot be read ({reason(e)}); fetch the shard again") from e
