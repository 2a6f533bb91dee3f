"""The header of a safetensors file: which tensors lie where, checked as the safetensors library checks it.

A reader that trusts offsets reads a neighbour's bytes when they are off by two, and finds nothing odd. So nothing is
taken from a header that the library would refuse, nor from one with a name twice, which it lets pass.

Source: https://github.com/huggingface/safetensors, README "Format" and `tensor.rs` (`Metadata::validate`), 0.8.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import ArtifactError, reason
from compress.files import open_file, unique_keys

MAX_HEADER_BYTES = 100_000_000
# safetensors' dtypes and the bits of one element
DTYPE_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
_METADATA = "__metadata__"
_ENTRIES = {"dtype", "shape", "data_offsets"}
_USIZE = 1 << 64


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies and what it is; `dtype` is the safetensors name, such as `F16`, `offset` its first byte."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        size = 1
        for n in self.shape:
            size *= n
        return size

    @property
    def num_bytes(self) -> int:
        return self.numel * DTYPE_BITS[self.dtype] // 8


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensor infos from a safetensors file's header, in order of offset.

    ArtifactError unless each tensor has a known dtype and begins where the one before ends, the size of its bytes is
    that of its shape, and the file ends with the last one.
    """
    try:
        with open_file(path) as f:
            size = f.seek(0, 2)
            f.seek(0)
            length = _length(f.read(8), size)
            header = _parsed(f.read(length))
        infos = _infos(path.name, header, 8 + length)
        end = max((i.offset + i.num_bytes for i in infos.values()), default=8 + length)
        if end != size:
            raise ValueError(f"{size} bytes, but its header describes {end}")
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file, though the index names it; the download is incomplete") from None
    except (ValueError, RecursionError, OSError) as e:
        raise ArtifactError(f"{path}: truncated or corrupt ({reason(e)}); fetch the shard again") from None
    return infos


def _length(first: bytes, size: int) -> int:
    if len(first) < 8:
        raise ValueError(f"{size} bytes, too few for a header")
    length = int(struct.unpack("<Q", first)[0])
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"header of {length} bytes in a file of {size}")
    return length


def _parsed(data: bytes) -> dict[str, Any]:
    if not data.startswith(b"{"):
        raise ValueError("its header is not a JSON object")
    header = json.loads(data.decode("utf-8"), object_pairs_hook=unique_keys)
    metadata = header.get(_METADATA)
    if metadata is not None:
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError(f"{_METADATA} is not a table of texts")
    return dict(header)


def _infos(file: str, header: dict[str, Any], begin: int) -> dict[str, TensorInfo]:
    entries = {name: _entry(name, value) for name, value in header.items() if name != _METADATA}
    infos = {}
    at = 0
    for name, (dtype, shape, start, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if start != at or stop < start:
            raise ValueError(f"tensor {name} lies at {start} to {stop}, but the one before it ends at {at}")
        info = TensorInfo(file=file, dtype=dtype, shape=shape, offset=begin + start)
        bits = info.numel * DTYPE_BITS[dtype]
        if bits >= _USIZE or bits % 8 or bits // 8 != stop - start:
            raise ValueError(f"tensor {name} of {dtype} {list(shape)} has {stop - start} bytes, not {bits / 8:g}")
        infos[name] = info
        at = stop
    return infos


def _entry(name: str, value: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, first byte and the byte behind the last, of one tensor's entry."""
    if not isinstance(value, dict) or not set(value) >= _ENTRIES:
        raise ValueError(f"the entry of tensor {name} is not dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"tensor {name} has the unknown dtype {str(dtype)[:40]!r}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name} has shape {str(shape)[:60]} and offsets {str(offsets)[:60]}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < _USIZE for n in value)
