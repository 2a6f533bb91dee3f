"""A checkpoint's weights as dense tensors, whatever they are stored as."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from compress.formats import Stored


def read_dense(stored: Stored, names: Sequence[str], *, pinned: bool = False) -> dict[str, Tensor]:
    """Tensors by name; a quantized layer's `weight` is dequantized to float32 `[O, I]`. pinned: see `read_pinned`.

    ArtifactError, naming it, for a tensor that the folder cannot give.
    """
    quantized = [n for n in names if n.endswith(".weight") and n.removesuffix(".weight") in stored]
    plain = [n for n in names if n not in quantized]
    out = stored.checkpoint.read_pinned(plain) if pinned else stored.checkpoint.read(plain)
    return out | {name: stored.dense(name.removesuffix(".weight")) for name in quantized}
