"""AutoAWQ's `gemm` layout: INT4 codes of eight neighbouring output columns in one int32.

For a linear with weight `[N, K]` (N out_features, K in_features) the file holds

    qweight  int32    [K, N / 8]      qzeros  int32  [K / group_size, N / 8]
    scales   float16  [K / group_size, N]            bias    float16  [N], if any

and nibble i (bits 4i to 4i+3) of word c holds column `8c + ORDER[i]`. Zero points are stored as they are (GPTQ
stores them less one). Source: AutoAWQ 0.2.9, `awq/modules/linear/gemm.py` and `awq/utils/packing_utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compress.errors import ArtifactError, UnsupportedError
from compress.quantized import QuantizedWeight
from compress.scheme import Scheme

QUANT_METHOD = "awq"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PACK = 8
SUFFIXES = ("qweight", "qzeros", "scales")


def check(scheme: Scheme, name: str, out_features: int, in_features: int) -> None:
    """Raise UnsupportedError or ConfigError when the layout cannot hold this layer."""
    if scheme.num_bits != 4:
        raise UnsupportedError(
            f"--bits {scheme.num_bits}: the AutoAWQ gemm format holds 4-bit codes only and no other format is "
            "written yet; use `compress awq --bits 4`"
        )
    scheme.groups(in_features, name)
    if scheme.group_size == -1:
        raise UnsupportedError(
            "--group-size -1: AutoAWQ readers disagree on one group a row; choose a --group-size such as 128"
        )
    if out_features % PACK:
        raise UnsupportedError(
            f"{name}: out_features={out_features} is not a multiple of {PACK}, which the AutoAWQ gemm format packs "
            f"into one word; list the layer in --skip"
        )


def pack_columns(codes_KN: Tensor) -> Tensor:
    """Codes 0..15 `[K, N]` into int32 `[K, N / 8]`."""
    grouped = codes_KN.reshape(codes_KN.shape[0], -1, PACK)
    words = torch.zeros(grouped.shape[:2], dtype=torch.int32, device=codes_KN.device)
    for nibble, column in enumerate(ORDER):
        words |= grouped[:, :, column].to(torch.int32) << (4 * nibble)
    return words


def unpack_columns(words: Tensor) -> Tensor:
    """int32 `[K, N / 8]` into codes, uint8 `[K, N]`; the inverse of `pack_columns`."""
    out = torch.empty((*words.shape, PACK), dtype=torch.uint8, device=words.device)
    for nibble, column in enumerate(ORDER):
        out[:, :, column] = ((words >> (4 * nibble)) & 0xF).to(torch.uint8)
    return out.reshape(words.shape[0], -1)


def tensors(q: QuantizedWeight) -> dict[str, Tensor]:
    """The file's tensors for one layer, keyed `qweight`, `qzeros`, `scales`."""
    return {
        "qweight": pack_columns(q.codes_OI.t()),
        "qzeros": pack_columns(q.zero_point_OG.t()),
        "scales": q.scale_OG.t().contiguous(),
    }


def read(parts: Mapping[str, Tensor], scheme: Scheme, name: str) -> QuantizedWeight:
    """The inverse of `tensors`. Raises ArtifactError when the three shapes do not fit each other."""
    qweight, qzeros, scales = (parts[s] for s in SUFFIXES)
    in_features, out_features = qweight.shape[0], qweight.shape[1] * PACK
    num_groups = scheme.groups(in_features, name)
    if tuple(scales.shape) != (num_groups, out_features) or tuple(qzeros.shape) != (
        num_groups,
        out_features // PACK,
    ):
        raise ArtifactError(
            f"{name}: scales {tuple(scales.shape)} and qzeros {tuple(qzeros.shape)} do not fit qweight "
            f"{tuple(qweight.shape)} with group_size {scheme.group_size}; its config does not match its weights"
        )
    return QuantizedWeight(
        codes_OI=unpack_columns(qweight).t().contiguous(),
        scale_OG=scales.to(torch.float16).t().contiguous(),
        zero_point_OG=unpack_columns(qzeros).t().contiguous(),
        scheme=scheme,
    )


def quantization_config(scheme: Scheme, not_converted: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    `zero_point` stays true for symmetric codes as well: the file does hold zero points (all 8), and readers
    refuse or misread `false` (vLLM issues 3392, 6985, 7517).
    """
    return {
        "quant_method": QUANT_METHOD,
        "version": "gemm",
        "bits": scheme.num_bits,
        "group_size": scheme.group_size,
        "zero_point": True,
        "modules_to_not_convert": not_converted or None,
    }


def scheme_of(config: Mapping[str, Any]) -> Scheme:
    """The scheme that a folder's `quantization_config` states; accepts AutoAWQ's older key names."""
    bits = config.get("bits", config.get("w_bit"))
    group_size = config.get("group_size", config.get("q_group_size"))
    version = str(config.get("version", "gemm")).lower()
    if not isinstance(bits, int) or not isinstance(group_size, int) or version != "gemm":
        raise UnsupportedError(
            f"AWQ folder with bits={bits}, group_size={group_size}, version={version!r}: only 4-bit `gemm` is read"
        )
    return Scheme(num_bits=bits, group_size=group_size)
