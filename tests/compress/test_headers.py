"""What a header may say: no more and no less than the safetensors library takes, but for names given twice."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from compress.errors import ArtifactError
from compress.headers import DTYPE_BITS, read_header

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.ones(6, dtype=torch.float16),
    "empty": torch.empty(0, 5),
    "scalar": torch.tensor(2.0),
    "z": torch.ones(4, dtype=torch.int64),
}


def parts() -> tuple[dict[str, Any], bytes]:
    data = save(TENSORS, metadata={"format": "pt"})
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def written(path: Path, header: dict[str, Any] | bytes, body: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def library_takes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    try:
        with safe_open(path, framework="pt") as f:
            return {k: (f.get_slice(k).get_dtype(), tuple(f.get_slice(k).get_shape())) for k in f.keys()}
    except Exception:
        return None


def we_take(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    try:
        return {name: (info.dtype, info.shape) for name, info in read_header(path).items()}
    except ArtifactError:
        return None


NUMBERS = st.one_of(st.integers(-2, 130), st.sampled_from([1.0, True, None, "4", 1 << 63, 1 << 64, 10**30]))
DTYPES = st.one_of(st.sampled_from([*DTYPE_BITS, "F12", "f32", ""]), st.none(), st.integers(0, 3))


@st.composite
def edits(draw: st.DrawFn) -> tuple[Any, ...]:
    """One change of a header: of a size, an offset, a dtype, a whole entry, or of the bytes behind it."""
    name = draw(st.sampled_from([*TENSORS, "__metadata__"]))
    kind = draw(st.sampled_from(["dtype", "shape", "offset", "shift", "drop", "swap", "copy", "entry", "body", "byte"]))
    return kind, name, draw(st.integers(0, 1)), draw(NUMBERS), draw(DTYPES), draw(st.integers(0, 10**6))


def edited(edit: tuple[Any, ...]) -> tuple[dict[str, Any] | bytes, bytes]:
    header, body = parts()
    kind, name, place, number, dtype, seed = edit
    entry = header[name]
    other = list(TENSORS)[seed % len(TENSORS)]
    if kind == "byte":
        text = bytearray(json.dumps(header).encode())
        text[seed % len(text)] ^= 1 << (seed % 8)
        return bytes(text), body
    if kind == "body":
        return header, body[: seed % (len(body) + 1)] + b"\0" * (place * seed % 9)
    if kind == "drop":
        del header[name]
    elif kind == "entry":
        header[name] = number
    elif kind == "swap":
        header[name], header[other] = header[other], entry
    elif kind == "copy":
        header["again"] = entry
    elif name == "__metadata__":
        header[name] = {"format": number}
    elif kind == "dtype":
        entry["dtype"] = dtype
    elif kind == "shape" and entry["shape"]:
        entry["shape"][place % len(entry["shape"])] = number
    elif kind == "offset":
        entry["data_offsets"][place] = number
    else:  # a table shifted by a few bytes, its length kept
        entry["data_offsets"] = [n + seed % 5 - 2 for n in entry["data_offsets"]]
    return header, body


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edit=edits())
def test_takes_what_the_library_takes(tmp_path: Path, edit: tuple[Any, ...]) -> None:
    path = written(tmp_path / "x.safetensors", *edited(edit))
    ours = we_take(path)
    try:
        text = path.read_bytes()[8:].decode("utf-8", "replace")
        pairs = json.JSONDecoder(object_pairs_hook=lambda p: p).raw_decode(text)[0]
        twice = len({k for k, _ in pairs}) < len(pairs)
    except ValueError:
        twice = False
    if not twice:
        assert ours == library_takes(path)


def test_reads_every_dtype_of_the_library(tmp_path: Path) -> None:
    """Sizes and offsets of each dtype, against what the library reads of the same file."""
    header: dict[str, Any] = {}
    at = 0
    for dtype, bits in DTYPE_BITS.items():
        header[dtype] = {"dtype": dtype, "shape": [2, 4], "data_offsets": [at, at + bits]}
        at += bits
    path = written(tmp_path / "x.safetensors", header, b"\0" * at)
    assert we_take(path) == library_takes(path)
    assert set(we_take(path) or {}) == set(DTYPE_BITS)


def test_a_name_twice(tmp_path: Path) -> None:
    one = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    path = written(tmp_path / "x.safetensors", f"{{{one},{one}}}".encode(), b"\0" * 4)
    assert library_takes(path) is not None
    with pytest.raises(ArtifactError, match="'a' stands there twice"):
        read_header(path)


def test_shifted_table_is_named(tmp_path: Path) -> None:
    header, body = parts()
    header["a.weight"]["data_offsets"] = [2, 50]
    header["b.weight"]["data_offsets"] = [50, 62]
    path = written(tmp_path / "x.safetensors", header, body)
    with pytest.raises(ArtifactError, match="x.safetensors: truncated or corrupt .tensor (a|b).weight lies at"):
        read_header(path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "dangling", "loop"])
def test_what_is_not_a_file_is_not_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(path if kind == "loop" else tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"x\.safetensors"):
        read_header(path)
