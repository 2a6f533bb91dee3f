"""An ONNX graph's weights in a file beside it, written a chunk at a time.

A protobuf ends at 2 GB, so no weight is ever in one: the model file holds names, shapes and places (`location`,
`offset`, `length`; onnx.proto, "external data"). Offsets are decimal text there and have no limit of their own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from compress.errors import ArtifactError

# A reader that maps a tensor into memory wants it to start on a page; what is smaller than one is copied anyway.
ALIGNMENT = 4096
SMALL = 64


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A weight to be written: ONNX element type and dims, what makes its bytes, the part of the model it counts to."""

    name: str
    data_type: int
    dims: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes]]
    part: str

    @property
    def num_bytes(self) -> int:
        return packed_bytes(self.data_type, self.dims)


def packed_bytes(data_type: int, dims: Iterable[int]) -> int:
    """Bytes of a tensor as ONNX stores it; two INT4 values share a byte."""
    bits = {
        onnx.TensorProto.INT4: 4,
        onnx.TensorProto.INT8: 8,
        onnx.TensorProto.FLOAT16: 16,
        onnx.TensorProto.FLOAT: 32,
        onnx.TensorProto.INT64: 64,
    }[data_type]
    return (bits * math.prod(dims) + 7) // 8


class DataFile:
    """Appends tensors to a new file. A context manager; closes durably."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self._file: Any = None

    def __enter__(self) -> DataFile:
        self._file = open(self.path, "xb")
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.truncate(self.offset)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def skip(self, num_bytes: int) -> None:
        """Leave room; a hole in the file, which takes no space on disk."""
        self.offset += num_bytes

    def append(self, tensor: Stored) -> onnx.TensorProto:
        """Write one tensor and return the entry that points at it. ArtifactError when its bytes are too few or many."""
        self.skip(-self.offset % (ALIGNMENT if tensor.num_bytes >= ALIGNMENT else SMALL))
        self._file.seek(self.offset)
        written = 0
        for chunk in tensor.chunks():
            self._file.write(chunk)
            written += len(chunk)
        if written != tensor.num_bytes:
            raise ArtifactError(
                f"{tensor.name}: {written} bytes for {list(tensor.dims)}, which needs {tensor.num_bytes}; the "
                "artifact's config does not match its weights"
            )
        entry = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        entry.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", self.path.name), ("offset", self.offset), ("length", written)):
            entry.external_data.add(key=key, value=str(value))
        self.offset += written
        return entry


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor's bytes lie."""

    location: str
    offset: int
    length: int


def place(tensor: onnx.TensorProto) -> Place | None:
    """A tensor's place outside the model file, or None when it is inside."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    found = {entry.key: entry.value for entry in tensor.external_data}
    return Place(location=found["location"], offset=int(found.get("offset", 0)), length=int(found["length"]))


def read_bytes(folder: Path, tensor: onnx.TensorProto) -> bytes:
    """A tensor's bytes, wherever they lie. ArtifactError when the file ends before they do."""
    where = place(tensor)
    if where is None:
        data: bytes = tensor.raw_data
        return data
    with open(folder / where.location, "rb") as f:
        f.seek(where.offset)
        data = f.read(where.length)
    if len(data) != where.length:
        raise ArtifactError(f"{folder / where.location}: ends inside {tensor.name}; export again")
    return data
