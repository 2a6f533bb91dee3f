"""Which files hold a model folder's weights: one rule for every loader, ours and those that we call.

It is transformers' rule where that is beyond doubt: `model.safetensors` if it is there, else the shards that the index
names, all of what they hold. Where a folder holds two answers, they must be equal byte for byte; otherwise the folder
is refused, because other readers (vLLM) choose otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import ArtifactError, UnsupportedError
from compress.files import CHUNK_BYTES, check_file, is_file, read_into, read_json
from compress.headers import TensorInfo, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def holds_safetensors(folder: Path) -> bool:
    """Whether a folder has weights under the names that are read, whole or not."""
    return _there(folder / SINGLE) or _there(folder / INDEX)


def read_weights(folder: Path, config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """The folder's tensors by name. ArtifactError for damage and for two sets of weights that differ."""
    named = config.get("transformers_weights")
    if named not in (None, SINGLE, INDEX):
        raise UnsupportedError(
            f"{folder}: config.json says that the weights are in {named!r}; rename that file to {SINGLE} and delete "
            "transformers_weights from config.json"
        )
    single, index = _there(folder / SINGLE), _there(folder / INDEX)
    if not single and not index:
        raise ArtifactError(f"{folder}: no safetensors weights{_other_weights(folder)}")
    if not index:
        return read_header(folder / SINGLE)
    weight_map = _weight_map(folder)
    files = sorted(set(weight_map.values()))
    if not single:
        return _read_shards(folder, weight_map, files)
    if not any(_there(folder / file) for file in files if file != SINGLE):
        # The index of shards that are gone, or of this one file.
        return read_header(folder / SINGLE)
    one = read_header(folder / SINGLE)
    missing = [file for file in files if not _there(folder / file)]
    if missing:
        raise _two_sets(folder, files, f"and of those {missing[0]} is missing")
    other = _read_shards(folder, weight_map, files)
    unlike = sorted(set(one) ^ set(other)) or [n for n in sorted(one) if not same_tensor(folder, one[n], other[n])]
    if unlike:
        raise _two_sets(folder, files, f"and they differ in {unlike[0]}")
    return one


def same_tensor(folder: Path, a: TensorInfo, b: TensorInfo) -> bool:
    """Whether two stored tensors are one: dtype, shape and every byte."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if (a.file, a.offset) == (b.file, b.offset):
        return True
    for start in range(0, a.num_bytes, CHUNK_BYTES):
        size = min(CHUNK_BYTES, a.num_bytes - start)
        left, right = bytearray(size), bytearray(size)
        read_into(folder / a.file, a.offset + start, memoryview(left))
        read_into(folder / b.file, b.offset + start, memoryview(right))
        if left != right:
            return False
    return True


def _read_shards(folder: Path, weight_map: Mapping[str, str], files: list[str]) -> dict[str, TensorInfo]:
    """All that the shards hold. A tensor that lies in two of them must be the same in both."""
    by_file = {file: read_header(folder / file) for file in files}
    infos: dict[str, TensorInfo] = {}
    for file, header in by_file.items():
        for name, info in header.items():
            if name in infos and not same_tensor(folder, infos[name], info):
                raise ArtifactError(
                    f"{folder}: tensor {name} is in {infos[name].file} and, differing, in {file}; "
                    "fetch the model again into an empty folder"
                )
            if infos.setdefault(name, info) is not info and weight_map.get(name) == file:
                infos[name] = info
    missing = sorted(name for name, file in weight_map.items() if name not in by_file[file])
    if missing:
        raise ArtifactError(
            f"{folder}: tensor {missing[0]} is not in {weight_map[missing[0]]} as the index says; fetch both again"
        )
    return infos


def _weight_map(folder: Path) -> dict[str, str]:
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError(f"{folder / INDEX}: has no weight_map; fetch the file again")
    if not isinstance(index.get("metadata"), dict):  # transformers writes into it
        raise ArtifactError(f"{folder / INDEX}: has no metadata that is a JSON object; fetch the file again")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise ArtifactError(f"{folder / INDEX}: names {file!r}, which is not a file of this folder; refused")
        if not file.endswith(".safetensors"):
            raise ArtifactError(f"{folder / INDEX}: names {file!r}, which is not a safetensors file; refused")
    return weight_map


def _two_sets(folder: Path, files: list[str], how: str) -> ArtifactError:
    return ArtifactError(
        f"{folder}: holds two sets of weights, {SINGLE} and the {len(files)} shards that {INDEX} names, {how}; "
        f"readers choose either, so delete the one that is not the model ({INDEX} with its shards, or {SINGLE})"
    )


def _there(path: Path) -> bool:
    """A file, or something else under its name: a pipe is not the same as nothing, and is named when it is opened."""
    try:
        return is_file(path) or path.is_symlink() or path.exists()
    except OSError:
        return True


def _other_weights(folder: Path) -> str:
    """What a folder without safetensors holds instead, and what to do about it."""
    others = [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in sorted(folder.glob(pattern))]
    if others:
        return (
            f"; it holds {others[0]}, a pickle that could run code: convert it to safetensors first (load it with "
            "transformers where you trust it, then save_pretrained)"
        )
    return f"; expected {SINGLE} or {INDEX}"


__all__ = ["INDEX", "SINGLE", "check_file", "holds_safetensors", "read_weights", "same_tensor"]
