"""A checkpoint's weights as dense tensors, whatever they are stored as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError, UnsupportedError
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


def dense_shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """The shape of what `read_dense` gives for `name`, from headers; ArtifactError when a layer's tensors deny it.

    Of compressed-tensors' packed layers the file states the shape in a tensor, which is read.
    """
    layer = name.removesuffix(".weight")
    config = quantization_of(checkpoint)
    if config is not None and f"{layer}.qweight" in checkpoint:
        return _awq_shape(checkpoint, layer, _awq_scheme(config))
    if config is not None and f"{layer}.weight_packed" in checkpoint:
        num_bits = int(pack_quantized.weight_args(config)["num_bits"])
        shape = tuple(int(n) for n in checkpoint.tensor(f"{layer}.weight_shape").flatten())
        packed = checkpoint.info(f"{layer}.weight_packed").shape
        per_word = 32 // max(1, num_bits)
        if len(shape) != 2 or packed != (shape[0], -(-shape[1] // per_word)):
            raise ArtifactError(
                f"{checkpoint.path}: {layer}.weight_packed {packed} cannot hold the {num_bits}-bit weight {shape} that "
                "weight_shape states; the folder is damaged, fetch it again"
            )
        return shape
    return checkpoint.info(name).shape


def _awq_shape(checkpoint: Checkpoint, layer: str, scheme: Scheme) -> tuple[int, ...]:
    qweight, qzeros, scales = (checkpoint.info(f"{layer}.{s}") for s in awq_gemm.SUFFIXES)
    if scheme.num_bits != 4:
        raise UnsupportedError(f"{checkpoint.path}: AWQ with {scheme.num_bits} bits is not read, only with 4")
    dtypes = qweight.dtype, qzeros.dtype, scales.dtype[:1]
    in_features, words = qweight.shape if len(qweight.shape) == 2 else (0, 0)
    num_groups = in_features // scheme.group_size if scheme.group_size > 0 else 1
    fits = qzeros.shape == (num_groups, words) and scales.shape == (num_groups, words * awq_gemm.PACK)
    if not in_features or not fits or dtypes not in (("I32", "I32", "F"), ("I32", "I32", "B")):
        raise ArtifactError(
            f"{checkpoint.path}: {layer}.qweight {qweight.dtype} {qweight.shape}, qzeros {qzeros.dtype} {qzeros.shape} "
            f"and scales {scales.dtype} {scales.shape} are not one layer of group_size {scheme.group_size}; "
            "its config does not match its weights"
        )
    return words * awq_gemm.PACK, in_features


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
