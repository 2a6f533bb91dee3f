"""Reading safetensors checkpoints a few tensors at a time.

Nothing here loads a whole model, and nothing here unpickles: only safetensors is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from compress.errors import ArtifactError, UnsupportedError, explained
from compress.files import CHUNK_BYTES, IO_THREADS, check_file, file_sha256, read_into, read_json
from compress.folders import check_folder
from compress.headers import TensorInfo, read_header
from compress.weights import INDEX, SINGLE, read_weights

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
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
}
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A lazily read Hugging Face model folder (one safetensors file, or shards with an index).

    Opening reads headers only. Which files are read: `compress.weights`; what is refused: there, and `read_header`.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo] = field(repr=False)

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        path = Path(path)
        check_folder(path)
        config = checked_config(path)
        return cls(path=path, config=config, tensors=read_weights(path, config))

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise ArtifactError(f"{self.path}: tensor {name} is missing; the download may be incomplete")
        return self.tensors[name]

    def dtype(self, name: str) -> torch.dtype:
        """The torch dtype of a tensor as stored; UnsupportedError for the sub-byte ones, which torch cannot hold."""
        stored = self.info(name).dtype
        if stored not in _TORCH_DTYPES:
            raise UnsupportedError(
                f"{self.path}: tensor {name} is stored as {stored}, which is not read; pass the model it was made from"
            )
        return _TORCH_DTYPES[stored]

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
            for name in members:
                self.dtype(name)
            with explained(f"{self.path / file}: cannot be read", "fetch the shard again"):
                check_file(self.path / file)
                with safe_open(self.path / file, framework="pt") as f:
                    for name in members:
                        out[name] = f.get_tensor(name).clone()
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
            out[name] = torch.empty(info.shape, dtype=self.dtype(name), pin_memory=torch.cuda.is_available())
            view = bytes_of(out[name])
            for start in range(0, info.num_bytes, CHUNK_BYTES):
                pieces.append((self.path / info.file, info.offset + start, view[start : start + CHUNK_BYTES]))
        with ThreadPoolExecutor(IO_THREADS) as pool:
            list(pool.map(lambda piece: read_into(*piece), pieces))
        return out

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """The rows `indices` (int64, sorted, unique) of a matrix, without holding all of it at once."""
        info = self.info(name)
        width = info.num_bytes // max(1, info.shape[0])
        step = max(1, CHUNK_BYTES // max(1, width))

        def part(start: int) -> Tensor:
            wanted = indices[(indices >= start) & (indices < start + step)] - start
            if not wanted.numel():
                return torch.empty(0, *info.shape[1:], dtype=self.dtype(name))
            return self.slice(name, start, min(start + step, info.shape[0]))[wanted]

        with ThreadPoolExecutor(IO_THREADS) as pool:
            return torch.cat(list(pool.map(part, range(0, info.shape[0], step))))

    def slice(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor, read past any memory map: no more than they are in memory."""
        info = self.info(name)
        width = info.num_bytes // max(1, info.shape[0])
        out = torch.empty(stop - start, *info.shape[1:], dtype=self.dtype(name))
        read_into(self.path / info.file, info.offset + start * width, bytes_of(out))
        return out

    def content_sha256(self) -> str:
        """Hash of what the model computes: its config and every weight file's bytes, in order of name.

        Streams at the speed of the disk; releases the interpreter lock, so it may run in a thread.
        """
        names = self.content_files()
        with ThreadPoolExecutor(IO_THREADS) as pool:
            found = pool.map(file_sha256, [self.path / n for n in names])
            return content_of(dict(zip(names, found, strict=True)), names)

    def content_files(self) -> list[str]:
        """The files that `content_sha256` is taken of."""
        return ["config.json", *sorted({info.file for info in self.tensors.values()})]

    def stamp(self) -> list[tuple[str, int, int, int]]:
        """Name, size, modification time and inode of each of them: whether one was changed while it was read."""
        stats = [(name, (self.path / name).stat()) for name in self.content_files()]
        return [(name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats]


def content_of(hashes: Mapping[str, str], names: Iterable[str]) -> str:
    """`Checkpoint.content_sha256` from the sha256 of its files."""
    total = hashlib.sha256()
    for name in names:
        total.update(f"{name}\0{hashes[name]}\n".encode())
    return total.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def checked_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json, with what we read of it of the right kinds. A `quantization_config` of null is none."""
    path = folder / "config.json"
    config = read_json(path)
    kinds: dict[str, tuple[type, str]] = {
        "architectures": (list, "a list"), "model_type": (str, "a text"), "quantization_config": (dict, "a table"),
        "text_config": (dict, "a table"), "auto_map": (dict, "a table"),
    }  # fmt: skip
    for key, (kind, called) in kinds.items():
        value = config.get(key)
        if value is not None and not isinstance(value, kind):
            raise ArtifactError(f"{path}: {key} is {str(value)[:60]!r}, not {called}; fetch the file again")
    if not all(isinstance(name, str) for name in config.get("architectures") or []):
        raise ArtifactError(f"{path}: architectures is not a list of texts; fetch the file again")
    if "quantization_config" in config and config["quantization_config"] is None:
        del config["quantization_config"]
    return config


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    return _DTYPE_NAMES[dtype]


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors name."""
    return _TORCH_DTYPES[name]


__all__ = [
    "INDEX",
    "SINGLE",
    "Checkpoint",
    "TensorInfo",
    "bytes_of",
    "checked_config",
    "dtype_name",
    "read_header",
    "torch_dtype",
]
