"""A quantized weight: integer codes with a scale and zero point for each group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress import numerics
from compress.errors import ArtifactError
from compress.scheme import Scheme

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """`w_OI ~= (codes - zero_point) * scale`, group by group.

    codes_OI: uint8 `[O, I]`, `0 <= code <= scheme.max_code`. scale_OG: `[O, G]`, finite and > 0, in the dtype that the
    file holds it in: float16 for AWQ, the model's own for compressed-tensors. zero_point_OG: uint8 `[O, G]`, all
    `scheme.symmetric_zero_point` when symmetric.
    """

    codes_OI: Tensor
    scale_OG: Tensor
    zero_point_OG: Tensor
    scheme: Scheme

    def __post_init__(self) -> None:
        out_features, in_features = self.codes_OI.shape
        shape_OG = (out_features, self.scheme.groups(in_features))
        assert self.codes_OI.dtype == self.zero_point_OG.dtype == torch.uint8
        assert self.scale_OG.dtype in SCALE_DTYPES
        assert tuple(self.scale_OG.shape) == tuple(self.zero_point_OG.shape) == shape_OG

    @classmethod
    def from_parts(
        cls, q_OGg: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme, dtype: torch.dtype = torch.float16
    ) -> QuantizedWeight:
        """From the float tensors that `numerics.quantize` and `scale_and_zero` return; scales are stored in `dtype`."""
        return cls(
            codes_OI=q_OGg.reshape(q_OGg.shape[0], -1).to(torch.uint8),
            scale_OG=scale.to(dtype),
            zero_point_OG=zero_point.to(torch.uint8),
            scheme=scheme,
        )

    def check(self, name: str) -> None:
        """Raise ArtifactError when a value is outside what the format can hold."""
        if not bool(torch.isfinite(self.scale_OG).all()) or bool((self.scale_OG <= 0).any()):
            raise ArtifactError(
                f"{name}: a scale is not a positive finite {str(self.scale_OG.dtype).removeprefix('torch.')}; "
                "its weights are damaged or too large"
            )
        for label, values in (("code", self.codes_OI), ("zero point", self.zero_point_OG)):
            if int(values.max()) > self.scheme.max_code:
                raise ArtifactError(f"{name}: {label} {int(values.max())} exceeds {self.scheme.max_code}")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[O, I]` that a reader computes with; the product is taken in float32."""
        q_OGg = numerics.to_groups(self.codes_OI, self.scheme).to(torch.float32)
        w = numerics.dequantize(q_OGg, self.scale_OG.float(), self.zero_point_OG.float())
        return w.reshape(self.codes_OI.shape).to(dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes as packed: codes and zero points at num_bits each, scales as they are."""
        bits = self.scheme.num_bits * (self.codes_OI.numel() + self.zero_point_OG.numel())
        return bits // 8 + self.scale_OG.element_size() * self.scale_OG.numel()

    def signed_OI(self) -> Tensor:
        """Codes less their zero point, int8 `[O, I]`: what integer matrix units multiply. Symmetric codes only."""
        middle = self.scheme.symmetric_zero_point
        assert self.scheme.symmetric or bool((self.zero_point_OG == middle).all())
        return (self.codes_OI.to(torch.int16) - middle).to(torch.int8)


@dataclass(frozen=True, kw_only=True)
class StaticInput:
    """The calibrated quantizer of a linear's inputs: `x ~= (q - zero_point) * scale`, one for the whole tensor.

    scale: `[1]`, finite and > 0, in the dtype that the file holds it in. zero_point: uint8 `[1]`, for codes 0..255; 128
    when symmetric.
    """

    scale: Tensor
    zero_point: Tensor

    def __post_init__(self) -> None:
        assert self.scale.shape == self.zero_point.shape == (1,)
        assert self.scale.dtype in SCALE_DTYPES and self.zero_point.dtype == torch.uint8

    def check(self, name: str) -> None:
        """Raise ArtifactError when the scale is not one."""
        if not bool(torch.isfinite(self.scale).all()) or bool((self.scale <= 0).any()):
            raise ArtifactError(
                f"{name}: its input scale {float(self.scale)} is not positive and finite; calibrate again"
            )
