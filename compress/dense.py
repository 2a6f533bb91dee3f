"""A checkpoint's weights as dense tensors, whatever they are stored as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.errors import UnsupportedError
from compress.formats import awq_gemm, pack_quantized
from compress.scheme import Scheme


def read_dense(checkpoint: Checkpoint, names: Sequence[str], *, pinned: bool = False) -> dict[str, Tensor]:
    """Tensors by name; a quantized layer's `weight` is dequantized to float32 `[O, I]`. pinned: see `read_pinned`."""
    plain = [n for n in names if n in checkpoint and not _is_quantized(checkpoint, n)]
    out = checkpoint.read_pinned(plain) if pinned else checkpoint.read(plain)
    config = quantization_of(checkpoint)
    for name in names:
        if name in out:
            continue
        layer = name.removesuffix(".weight")
        if config is None:
            checkpoint.info(name)  # raises, naming the missing tensor
        if f"{layer}.qweight" in checkpoint:
            parts = checkpoint.read(f"{layer}.{s}" for s in awq_gemm.SUFFIXES)
            short = {k.rsplit(".", 1)[1]: v for k, v in parts.items()}
            out[name] = awq_gemm.read(short, _awq_scheme(config or {}), layer).dequantize()
        elif f"{layer}.weight_scale" in checkpoint:
            stored = [n for n in checkpoint.tensors if n.startswith(f"{layer}.weight")]
            parts = {n.removeprefix(f"{layer}."): t for n, t in checkpoint.read(stored).items()}
            out[name] = pack_quantized.dequantize(parts, pack_quantized.weight_args(config or {}))
        else:
            checkpoint.info(name)
    return out


def quantization_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The folder's `quantization_config`, or None for plain weights. UnsupportedError for one we cannot read."""
    config = checkpoint.config.get("quantization_config")
    if config is None:
        return None
    method = config.get("quant_method")
    if method not in (awq_gemm.QUANT_METHOD, pack_quantized.QUANT_METHOD):
        raise UnsupportedError(
            f"{checkpoint.path}: quant_method {method!r} is not read; AutoAWQ gemm and compressed-tensors folders are"
        )
    result: dict[str, Any] = config
    return result


def _awq_scheme(config: dict[str, Any]) -> Scheme:
    return awq_gemm.scheme_of(config)


def _is_quantized(checkpoint: Checkpoint, name: str) -> bool:
    return name.endswith(".weight") and f"{name}_scale" in checkpoint
