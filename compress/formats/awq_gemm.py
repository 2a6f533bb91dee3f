"""AutoAWQ's `gemm` layout: INT4 codes of eight neighbouring output columns in one int32.

For a linear with weight `[N, K]` (N out_features, K in_features) the file holds

    qweight  int32    [K, N / 8]      qzeros  int32  [K / group_size, N / 8]
    scales   float16  [K / group_size, N]            bias    float16  [N], if any

and nibble i (bits 4i to 4i+3) of word c holds column `8c + ORDER[i]`. Zero points are stored as they are (GPTQ
stores them less one). Source: AutoAWQ 0.2.9, `awq/modules/linear/gemm.py` and `awq/utils/packing_utils.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError, UnsupportedError
from compress.formats import second_reader
from compress.formats.format import Shape, check_groups
from compress.plan import LayerPlan, LayerScheme
from compress.quantized import QuantizedWeight, StaticInput
from compress.scheme import Scheme

NAME = "awq-gemm"
QUANT_METHOD = "awq"
NUM_BITS = (4,)
LEAVES = ("qweight", "qzeros", "scales")
CODES = ("qweight",)
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PACK = 8


def check(plan: LayerPlan, shapes: Mapping[str, Shape]) -> None:
    """See `Format.check`. What a person can choose, the group size, comes before what only --skip mends."""
    check_groups(plan, shapes)
    for name in plan.quantized:
        scheme = plan[name]
        if scheme.weight is None or scheme.input is not None:
            raise UnsupportedError(
                f"{name}: the AutoAWQ gemm format holds no quantized inputs; choose the compressed-tensors format for "
                f"{scheme.label()}"
            )
        check_bits(scheme.weight.num_bits)
        out_features, _ = shapes[name]
        if scheme.weight.group_size == -1:
            raise UnsupportedError(
                "--group-size -1: AutoAWQ readers disagree on one group a row; choose a --group-size such as 128"
            )
        if out_features % PACK:
            raise UnsupportedError(
                f"{name}: out_features={out_features} is not a multiple of {PACK}, which the AutoAWQ gemm format packs "
                f"into one word; list the layer in --skip"
            )
    plan.only()  # its config states one scheme for all layers


def check_bits(num_bits: int) -> None:
    """Raise UnsupportedError for codes of other widths than the layout's."""
    if num_bits not in NUM_BITS:
        raise UnsupportedError(
            f"--bits {num_bits}: the AutoAWQ gemm format holds codes of {' or '.join(map(str, NUM_BITS))} bits only; "
            f"use `compress awq --bits {NUM_BITS[0]}`"
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


def tensors(
    weight: QuantizedWeight, scheme: LayerScheme | None = None, static: StaticInput | None = None
) -> dict[str, Tensor]:
    """The file's tensors for one layer, keyed `qweight`, `qzeros`, `scales`. The codes say all of the scheme."""
    assert static is None
    return {
        "qweight": pack_columns(weight.codes_OI.t()),
        "qzeros": pack_columns(weight.zero_point_OG.t()),
        "scales": weight.scale_OG.to(torch.float16).t().contiguous(),
    }


def read(parts: Mapping[str, Tensor], scheme: LayerScheme, name: str) -> QuantizedWeight:
    """The inverse of `tensors`. Raises ArtifactError when the three shapes do not fit each other."""
    assert scheme.weight is not None
    missing = [leaf for leaf in LEAVES if leaf not in parts]
    if missing:
        raise ArtifactError(f"{name}: tensor {name}.{missing[0]} is missing; the download may be incomplete")
    qweight, qzeros, scales = (parts[leaf] for leaf in LEAVES)
    in_features, out_features = qweight.shape[0], qweight.shape[1] * PACK
    num_groups = scheme.weight.groups(in_features, name)
    if tuple(scales.shape) != (num_groups, out_features) or tuple(qzeros.shape) != (
        num_groups,
        out_features // PACK,
    ):
        raise ArtifactError(
            f"{name}: scales {tuple(scales.shape)} and qzeros {tuple(qzeros.shape)} do not fit qweight "
            f"{tuple(qweight.shape)} with group_size {scheme.weight.group_size}; its config does not match its weights"
        )
    return QuantizedWeight(
        codes_OI=unpack_columns(qweight).t().contiguous(),
        scale_OG=scales.to(torch.float16).t().contiguous(),
        zero_point_OG=unpack_columns(qzeros).t().contiguous(),
        scheme=scheme.weight,
    )


def read_static(parts: Mapping[str, Tensor], scheme: LayerScheme, name: str) -> StaticInput | None:
    """The layout has none."""
    return None


def config(plan: LayerPlan) -> dict[str, Any]:
    """See `Format.config`.

    `zero_point` stays true for symmetric codes as well: the file does hold zero points (all 8), and readers
    refuse or misread `false` (vLLM issues 3392, 6985, 7517).
    """
    scheme = plan.only().weight
    assert scheme is not None
    return {
        "quant_method": QUANT_METHOD,
        "version": "gemm",
        "bits": scheme.num_bits,
        "group_size": scheme.group_size,
        "zero_point": True,
        "modules_to_not_convert": list(plan.left_dense) or None,
    }


def layers(names: Iterable[str]) -> list[str]:
    """See `Format.layers`."""
    return sorted(name.removesuffix(".qweight") for name in names if name.endswith(".qweight"))


def plan(config: Mapping[str, Any], checkpoint: Checkpoint) -> LayerPlan:
    """See `Format.plan`. Asymmetric codes are stated, since the config does not say; `Stored.exact_plan` looks."""
    scheme = LayerScheme(weight=scheme_of(config))
    return LayerPlan(dict.fromkeys(layers(checkpoint.tensors), scheme))


def shape(checkpoint: Checkpoint, layer: str, scheme: LayerScheme) -> Shape:
    """See `Format.shape`."""
    assert scheme.weight is not None
    if scheme.weight.num_bits != 4:
        raise UnsupportedError(f"{checkpoint.path}: AWQ with {scheme.weight.num_bits} bits is not read, only with 4")
    qweight, qzeros, scales = (checkpoint.info(f"{layer}.{leaf}") for leaf in LEAVES)
    in_features, words = qweight.shape if len(qweight.shape) == 2 else (0, 0)
    group_size = scheme.weight.group_size if scheme.weight.group_size > 0 else max(1, in_features)
    fits = qzeros.shape == (in_features // group_size, words) and scales.shape == (qzeros.shape[0], words * PACK)
    dtypes = qweight.dtype, qzeros.dtype, scales.dtype in ("F16", "BF16", "F32")
    if not in_features or in_features % group_size or not fits or dtypes != ("I32", "I32", True):
        raise ArtifactError(
            f"{checkpoint.path}: {layer}.qweight {qweight.dtype} {qweight.shape}, qzeros {qzeros.dtype} {qzeros.shape} "
            f"and scales {scales.dtype} {scales.shape} are not one layer of group_size {scheme.weight.group_size}; "
            "its config does not match its weights"
        )
    return words * PACK, in_features


def is_symmetric(checkpoint: Checkpoint, layer: str, scheme: LayerScheme) -> bool:
    """See `Format.is_symmetric`: whether every zero point is the middle code."""
    assert scheme.weight is not None
    word = pack_columns(torch.full((1, PACK), scheme.weight.symmetric_zero_point))
    return bool((checkpoint.tensor(f"{layer}.qzeros") == word).all())


def read_again(parts: Mapping[str, Tensor], scheme: LayerScheme) -> dict[str, second_reader.Again]:
    """See `Format.read_again`."""
    kind, scales_GN = second_reader.raw(parts["scales"])
    return {
        "codes": ("torch.uint8", second_reader.unpack_awq(parts["qweight"].numpy()).T),
        "scales": (kind, scales_GN.T),
        "zero_points": ("torch.uint8", second_reader.unpack_awq(parts["qzeros"].numpy()).T),
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
