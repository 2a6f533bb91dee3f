"""Reading and writing safetensors checkpoints a few tensors at a time.

Nothing here loads a whole model, and nothing here unpickles: only safetensors is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.errors import ArtifactError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_CHUNK_BYTES = 16 << 20
# Threads that read, copy or hash files; a disk wants several requests at once, and a core hashes 1 to 2 GB/s.
IO_THREADS = min(8, os.cpu_count() or 1)

# safetensors names of dtypes (https://github.com/huggingface/safetensors, format section)
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
_DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies and what it is; `dtype` is the safetensors name, such as `F16`, `offset` its first byte."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        size = _DTYPE_BYTES.get(self.dtype, 1)
        for n in self.shape:
            size *= n
        return size


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A lazily read Hugging Face model folder (one safetensors file, or shards with an index).

    Opening reads headers only, and refuses a folder whose index names files outside it, whose shards are
    truncated, or whose tensors are not where the index says.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo] = field(repr=False)

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        path = Path(path)
        if not path.is_dir():
            raise ArtifactError(f"{path}: no such folder; pass a Hugging Face model folder with config.json")
        config = read_json(path / "config.json")
        tensors: dict[str, TensorInfo] = {}
        if (path / INDEX).exists():
            tensors = _read_index(path)
        elif (path / SINGLE).exists():
            tensors = _read_header(path / SINGLE)
        else:
            others = sorted(p.name for p in path.glob("*.bin")) + sorted(p.name for p in path.glob("*.pt*"))
            hint = (
                f"; it holds {others[0]}, a pickle that could run code: convert it to safetensors first"
                if others
                else "; expected model.safetensors or model.safetensors.index.json"
            )
            raise ArtifactError(f"{path}: no safetensors weights{hint}")
        return cls(path=path, config=config, tensors=tensors)

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise ArtifactError(f"{self.path}: tensor {name} is missing; the download may be incomplete")
        return self.tensors[name]

    def tensor(self, name: str) -> Tensor:
        """One tensor in its stored dtype, copied out of the file."""
        return self.read([name])[name]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Several tensors, each file opened once. Copies, so that no mapped page outlives the call."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.info(name).file, []).append(name)
        out: dict[str, Tensor] = {}
        for file, members in by_file.items():
            try:
                with safe_open(self.path / file, framework="pt") as f:
                    for name in members:
                        out[name] = f.get_tensor(name).clone()
            except (SafetensorError, OSError) as e:
                raise ArtifactError(f"{self.path / file}: cannot be read ({e}); fetch the shard again") from e
        return out

    def read_pinned(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Several tensors in page-locked memory, from which a GPU fetches them at the full speed of its link.

        The files are read in parallel and past any memory map: one page fault at a time, neither a disk nor the page
        cache gives what it can.
        """
        wanted = {name: self.info(name) for name in names}
        pieces: list[tuple[Path, int, memoryview]] = []
        out: dict[str, Tensor] = {}
        for name, info in wanted.items():
            out[name] = torch.empty(info.shape, dtype=_TORCH_DTYPES[info.dtype], pin_memory=torch.cuda.is_available())
            view = _bytes_of(out[name])
            for start in range(0, info.num_bytes, _CHUNK_BYTES):
                pieces.append((self.path / info.file, info.offset + start, view[start : start + _CHUNK_BYTES]))
        with ThreadPoolExecutor(IO_THREADS) as pool:
            list(pool.map(lambda piece: _read_into(*piece), pieces))
        return out

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """The rows `indices` (int64, sorted, unique) of a matrix, without holding all of it at once."""
        info = self.info(name)
        width = info.num_bytes // info.shape[0]
        step = max(1, _CHUNK_BYTES // width)

        def part(start: int) -> Tensor:
            wanted = indices[(indices >= start) & (indices < start + step)] - start
            if not wanted.numel():
                return torch.empty(0, *info.shape[1:], dtype=_TORCH_DTYPES[info.dtype])
            return self.slice(name, start, min(start + step, info.shape[0]))[wanted]

        with ThreadPoolExecutor(IO_THREADS) as pool:
            return torch.cat(list(pool.map(part, range(0, info.shape[0], step))))

    def slice(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor, read past any memory map: no more than they are in memory."""
        info = self.info(name)
        width = info.num_bytes // info.shape[0]
        out = torch.empty(stop - start, *info.shape[1:], dtype=_TORCH_DTYPES[info.dtype])
        _read_into(self.path / info.file, info.offset + start * width, _bytes_of(out))
        return out

    def content_sha256(self) -> str:
        """Hash of what the model computes: its config and every weight file's bytes, in order of name.

        Streams at the speed of the disk; releases the interpreter lock, so it may run in a thread.
        """
        total = hashlib.sha256()
        names = ["config.json", *sorted({info.file for info in self.tensors.values()})]
        with ThreadPoolExecutor(IO_THREADS) as pool:
            for name, found in zip(names, pool.map(file_sha256, [self.path / n for n in names]), strict=True):
                total.update(f"{name}\0{found}\n".encode())
        return total.hexdigest()

    def identity(self) -> str:
        """A cheap stand-in for `content_sha256` on this machine: names, sizes and modification times.

        Only ever compared with an earlier run over the same folder, to decide whether it may be resumed.
        """
        files = sorted({info.file for info in self.tensors.values()})
        stats = [(f, (s := (self.path / f).stat()).st_size, s.st_mtime_ns) for f in ["config.json", *files]]
        return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


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
        while chunk := f.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensor infos from a safetensors file's header, checked against the file's length."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if length > size:
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(f.read(length))
        end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
        if 8 + length + end != size:
            raise ValueError(f"{size} bytes, but its header describes {8 + length + end}")
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file, though the index names it; the download is incomplete") from None
    except (ValueError, KeyError, TypeError, struct.error, OSError) as e:
        raise ArtifactError(f"{path}: truncated or corrupt ({e}); fetch the shard again") from None
    return {
        name: TensorInfo(
            file=path.name, dtype=v["dtype"], shape=tuple(v["shape"]), offset=8 + length + v["data_offsets"][0]
        )
        for name, v in header.items()
        if name != "__metadata__"
    }


def _read_index(path: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError(f"{path / INDEX}: has no weight_map; fetch the file again")
    for file in set(weight_map.values()):
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise ArtifactError(f"{path / INDEX}: names {file!r}, which is not a file of this folder; refused")
    infos: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        infos.update(_read_header(path / file))
    missing = sorted(name for name, file in weight_map.items() if name not in infos or infos[name].file != file)
    if missing:
        raise ArtifactError(f"{path}: tensor {missing[0]} is not in {weight_map[missing[0]]} as the index says")
    return {name: infos[name] for name in weight_map}


# ---- writing -----------------------------------------------------------------------------------------


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


def save_atomically(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file that appears whole or not at all."""
    tmp = path.with_name(f".{path.name}.tmp")
    save_file({k: v.contiguous() for k, v in sorted(tensors.items())}, tmp, metadata={"format": "pt"})
    with open(tmp, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(tmp, path)
    fsync_dir(path.parent)


def merge_shards(parts: list[Path], out: Path, *, max_shard_bytes: int) -> dict[str, str]:
    """Copy the tensors of `parts` (safetensors files) into Hugging Face shards in `out`; returns name -> file.

    Bytes are streamed, so memory does not depend on the shard's size. One shard is called
    `model.safetensors`; several get an index. Tensors keep the order of `parts`, then of name.
    """
    sources = [(part, name, info) for part in parts for name, info in sorted(_read_header(part).items())]
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
        _stream_shard(out / file, members)
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
        header = _read_header(part)
        weight_map.update(dict.fromkeys(sorted(header), file))
        total += sum(info.num_bytes for info in header.values())
        try:
            os.link(part, out / file)
        except OSError:
            _copy_durably(part, out / file)
    _write_index(out, weight_map, total)
    fsync_dir(out)
    return weight_map


def _copy_durably(source: Path, target: Path) -> None:
    with open(source, "rb") as read, open(target, "wb") as write:
        shutil.copyfileobj(read, write, _CHUNK_BYTES)
        write.flush()
        os.fsync(write.fileno())


def _write_index(out: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_bytes_atomically(out / INDEX, json_bytes(index))


def _stream_shard(path: Path, members: list[tuple[Path, str, TensorInfo]]) -> None:
    head = _head([(name, info.dtype, info.shape, info.num_bytes) for _, name, info in members])
    tmp = path.with_name(f".{path.name}.tmp")
    with open(tmp, "wb") as f:
        f.write(head)
        f.flush()
        pieces = []
        to = len(head)
        for part, _, info in members:
            for start in range(0, info.num_bytes, _CHUNK_BYTES):
                size = min(_CHUNK_BYTES, info.num_bytes - start)
                pieces.append((part, info.offset + start, f.fileno(), to + start, size))
            to += info.num_bytes
        f.truncate(to)
        with ThreadPoolExecutor(IO_THREADS) as pool:
            list(pool.map(lambda piece: _copy_piece(*piece), pieces))
        os.fsync(f.fileno())
    os.replace(tmp, path)
    fsync_dir(path.parent)


def save_in_parts(
    path: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...], parts: Iterable[Tensor]
) -> tuple[str, str]:
    """A safetensors file of one tensor, given as consecutive `parts` along its first axis; appears whole or not at all.

    One part is in memory at a time, and its bytes are hashed as they are written. Returns the file's sha256 and the
    tensor's, as `tensor_sha256` gives it.
    """
    size = math.prod(shape) * dtype.itemsize
    head = _head([(name, dtype_name(dtype), shape, size)])
    file, content = hashlib.sha256(head), hashlib.sha256(tensor_head(dtype, shape))
    tmp = path.with_name(f".{path.name}.tmp")
    with open(tmp, "wb") as f, ThreadPoolExecutor(2) as pool:
        f.write(head)
        for part in parts:
            assert part.dtype == dtype
            data = _bytes_of(part.contiguous())
            hashed = [pool.submit(digest.update, data) for digest in (file, content)]
            f.write(data)
            for one in hashed:
                one.result()
        f.flush()
        assert f.tell() == len(head) + size, f"{name}: parts do not add up to {shape}"
        os.fsync(f.fileno())
    os.replace(tmp, path)
    fsync_dir(path.parent)
    return file.hexdigest(), content.hexdigest()


def tensor_head(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    """What `tensor_sha256` puts before a tensor's bytes."""
    return f"{dtype}{tuple(shape)}".encode()


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 of a tensor's dtype, shape and bytes."""
    flat = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(tensor_head(flat.dtype, tuple(flat.shape)))
    digest.update(_bytes_of(flat))
    return digest.hexdigest()


def _head(members: list[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Length and header of a safetensors file whose tensors (name, dtype, shape, bytes) lie in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, size in members:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _copy_piece(source: Path, begin: int, target: int, to: int, size: int) -> None:
    """`size` bytes of `source` from byte `begin` to byte `to` of the open file `target`."""
    data = bytearray(size)
    _read_into(source, begin, memoryview(data))
    left = memoryview(data)
    while left:
        written = os.pwrite(target, left, to)
        to += written
        left = left[written:]


def _read_into(path: Path, begin: int, view: memoryview) -> None:
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


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    return _DTYPE_NAMES[dtype]
