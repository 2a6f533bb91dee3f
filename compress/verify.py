"""Reading an artifact back with code that shares nothing with the writer, and comparing it with what was meant.

Written in numpy from the format's description, one nibble at a time, on purpose: a mistake in the packing code
cannot also be here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError

# Column j of each run of eight lies in this nibble of its word.
_NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)


def unpack_awq(words: np.ndarray) -> np.ndarray:
    """AutoAWQ gemm words int32 `[K, N / 8]` into codes uint8 `[K, N]`."""
    unsigned = words.view(np.uint32)
    out = np.empty((words.shape[0], words.shape[1] * 8), dtype=np.uint8)
    for column, nibble in enumerate(_NIBBLE_OF_COLUMN):
        out[:, column::8] = (unsigned // np.uint32(16**nibble)) % np.uint32(16)
    return out


def verify_written(folder: Path, meant: Mapping[str, str]) -> int:
    """Reopen every tensor of `folder` and compare with the digests in `meant`; returns how many were compared.

    meant maps a tensor's name, or for a packed layer `layer.codes`, `layer.scales` and `layer.zero_points` in the
    `[out_features, ...]` orientation, to the digest of what the run computed. Raises ArtifactError at the first
    difference, and for tensors that are missing or that nobody meant to write.
    """
    checkpoint = Checkpoint.open(folder)
    seen: set[str] = set()
    for name in checkpoint.names():
        value = _array(checkpoint, name)
        layer, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            key, value, kind = f"{layer}.codes", np.ascontiguousarray(unpack_awq(value).T), "torch.uint8"
        elif leaf == "qzeros":
            key, value, kind = (
                f"{layer}.zero_points",
                np.ascontiguousarray(unpack_awq(value).T),
                "torch.uint8",
            )
        elif leaf == "scales" and f"{layer}.scales" in meant:
            key, value, kind = name, np.ascontiguousarray(value.T), "torch.float16"
        else:
            key, kind = name, _kind(checkpoint, name)
        shape = ", ".join(str(n) for n in value.shape) + ("," if value.ndim == 1 else "")
        found = hashlib.sha256(f"{kind}({shape})".encode() + value.tobytes()).hexdigest()
        if meant.get(key) != found:
            what = "was not meant to be there" if key not in meant else "differs from what was computed"
            raise ArtifactError(f"{folder}: {key} {what}; the disk or memory is faulty, run again")
        seen.add(key)
    missing = sorted(set(meant) - seen)
    if missing:
        raise ArtifactError(f"{folder}: {missing[0]} was not written; run again")
    return len(seen)


def _kind(checkpoint: Checkpoint, name: str) -> str:
    return str(checkpoint.tensor(name).dtype)


def _array(checkpoint: Checkpoint, name: str) -> np.ndarray:
    tensor = checkpoint.tensor(name)
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 2 and str(tensor.dtype) == "torch.bfloat16":
        import torch

        return tensor.view(torch.int16).numpy()
    return tensor.numpy()
