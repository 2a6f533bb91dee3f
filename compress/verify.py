"""Reading an artifact back with code that shares nothing with the writer, and comparing it with what was meant.

Written in numpy from the format's description, one nibble at a time, on purpose: a mistake in the packing code
cannot also be here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from compress.checkpoint import IO_THREADS, Checkpoint
from compress.errors import ArtifactError

# Column j of each run of eight lies in this nibble of its word.
_NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)


def unpack_awq(words: np.ndarray) -> np.ndarray:
    """AutoAWQ gemm words int32 `[K, N / 8]` into codes uint8 `[K, N]`, a view that is contiguous as `[N, K]`."""
    unsigned = np.ascontiguousarray(words.view(np.uint32).T)
    out = np.empty((unsigned.shape[0], 8, unsigned.shape[1]), dtype=np.uint8)
    for column, nibble in enumerate(_NIBBLE_OF_COLUMN):
        out[:, column] = (unsigned >> np.uint32(4 * nibble)) & np.uint32(15)
    return out.reshape(-1, unsigned.shape[1]).T


def verify_written(folder: Path, meant: Mapping[str, str]) -> int:
    """Reopen every tensor of `folder` and compare with the digests in `meant`; returns how many were compared.

    meant maps a tensor's name, or for a packed layer `layer.codes`, `layer.scales` and `layer.zero_points` in the
    `[out_features, ...]` orientation, to the digest of what the run computed. Raises ArtifactError at the first
    difference, and for tensors that are missing or that nobody meant to write. Tensors are compared side by side:
    unpacking and hashing leave the interpreter free.
    """
    checkpoint = Checkpoint.open(folder)
    seen: set[str] = set()
    with ThreadPoolExecutor(IO_THREADS) as pool:
        for key, found in pool.map(lambda name: _found(checkpoint, name, meant), checkpoint.names()):
            if meant.get(key) != found:
                what = "was not meant to be there" if key not in meant else "differs from what was computed"
                raise ArtifactError(f"{folder}: {key} {what}; the disk or memory is faulty, run again")
            seen.add(key)
    missing = sorted(set(meant) - seen)
    if missing:
        raise ArtifactError(f"{folder}: {missing[0]} was not written; run again")
    return len(seen)


def _found(checkpoint: Checkpoint, name: str, meant: Mapping[str, str]) -> tuple[str, str]:
    """What a stored tensor is called in `meant`, and the digest of what it holds."""
    value, kind = _array(checkpoint, name)
    key = name
    layer, _, leaf = name.rpartition(".")
    if leaf in ("qweight", "qzeros"):
        key = f"{layer}.{'codes' if leaf == 'qweight' else 'zero_points'}"
        value, kind = unpack_awq(value).T, "torch.uint8"
    elif leaf == "scales" and name in meant:
        value, kind = np.ascontiguousarray(value.T), "torch.float16"
    shape = ", ".join(str(n) for n in value.shape) + ("," if value.ndim == 1 else "")
    digest = hashlib.sha256(f"{kind}({shape})".encode())
    digest.update(value.reshape(-1).view(np.uint8))
    return key, digest.hexdigest()


def _array(checkpoint: Checkpoint, name: str) -> tuple[np.ndarray, str]:
    """A tensor's values and the name of its dtype; bfloat16, which numpy lacks, as the same bits in int16."""
    tensor = checkpoint.tensor(name)
    kind = str(tensor.dtype)
    if kind == "torch.bfloat16":
        import torch

        tensor = tensor.view(torch.int16)
    return tensor.numpy(), kind
