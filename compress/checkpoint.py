"""Reading and writing safetensors checkpoints a few tensors at a time.

Nothing here loads a whole model, and nothing here unpickles: only safetensors is read.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.errors import ArtifactError
from compress.files import CHUNK_BYTES, IO_THREADS, file_sha256, read_into, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

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
            tensors = read_header(path / SINGLE)
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
            view = bytes_of(out[name])
            for start in range(0, info.num_bytes, CHUNK_BYTES):
                pieces.append((self.path / info.file, info.offset + start, view[start : start + CHUNK_BYTES]))
        with ThreadPoolExecutor(IO_THREADS) as pool:
            list(pool.map(lambda piece: read_into(*piece), pieces))
        return out

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """The rows `indices` (int64, sorted, unique) of a matrix, without holding all of it at once."""
        info = self.info(name)
        width = info.num_bytes // info.shape[0]
        step = max(1, CHUNK_BYTES // width)

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
        read_into(self.path / info.file, info.offset + start * width, bytes_of(out))
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


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def read_header(path: Path) -> dict[str, TensorInfo]:
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
        infos.update(read_header(path / file))
    missing = sorted(name for name, file in weight_map.items() if name not in infos or infos[name].file != file)
    if missing:
        raise ArtifactError(f"{path}: tensor {missing[0]} is not in {weight_map[missing[0]]} as the index says")
    return {name: infos[name] for name in weight_map}


# ---- writing -----------------------------------------------------------------------------------------


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    return _DTYPE_NAMES[dtype]


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors name."""
    return _TORCH_DTYPES[name]
