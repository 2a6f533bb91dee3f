"""compressed-tensors' `pack-quantized` layout: codes of neighbouring input columns in one int32. Read only.

    weight_packed      int32  [O, ceil(I * num_bits / 32)]   sequential codes, each stored as value + 2**(b-1)
    weight_scale       float  [O, G]
    weight_zero_point  int32  [ceil(O * num_bits / 32), G]   packed along O, if asymmetric
    weight_shape       int64  [2]

Source: compressed-tensors 0.20, `compressors/pack_quantized`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compress.errors import UnsupportedError

QUANT_METHOD = "compressed-tensors"


def unpack_rows(words: Tensor, num_bits: int, num_columns: int) -> Tensor:
    """int32 `[R, W]` into unsigned codes, int32 `[R, num_columns]`, lowest bits first."""
    per_word = 32 // num_bits
    shifts = torch.arange(per_word, dtype=torch.int32) * num_bits
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << num_bits) - 1)
    return codes.reshape(words.shape[0], -1)[:, :num_columns]


def weight_args(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one weight scheme of a folder's `quantization_config`; UnsupportedError when there are several."""
    groups = list((config.get("config_groups") or {}).values())
    if len(groups) != 1 or config.get("format") not in ("pack-quantized", "int-quantized", "naive-quantized"):
        raise UnsupportedError(
            f"compressed-tensors folder with {len(groups)} config groups in format {config.get('format')!r}: only one "
            "group of pack-quantized or int-quantized weights is read"
        )
    args: Mapping[str, Any] = groups[0]["weights"]
    return args


def dequantize(parts: Mapping[str, Tensor], args: Mapping[str, Any]) -> Tensor:
    """The dense float32 weight `[O, I]` of one layer from its tensors, keyed without the layer's name."""
    num_bits = int(args["num_bits"])
    scale = parts["weight_scale"].float()
    if "weight_packed" in parts:
        rows, columns = (int(n) for n in parts["weight_shape"])
        half = 1 << (num_bits - 1)
        q = unpack_rows(parts["weight_packed"], num_bits, columns).float() - half
    else:
        q = parts["weight"].float()
        rows, columns = q.shape
    zero = torch.zeros_like(scale)
    if "weight_zero_point" in parts:
        stored = parts["weight_zero_point"]
        if stored.dtype == torch.int32 and "weight_packed" in parts:
            zero = (unpack_rows(stored.t().contiguous(), num_bits, rows) - half).t().float()
        else:
            zero = stored.float()
    groups = scale.shape[1] if scale.ndim == 2 else 1
    q = q.reshape(rows, groups, -1)
    return ((q - zero.reshape(-1, groups, 1)) * scale.reshape(-1, groups, 1)).reshape(rows, columns)
