"""A quantized weight: integer codes with a scale and zero point for each group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress import numerics
from compress.errors import ArtifactError
from compress.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """`w_OI ~= (codes - zero_point) * scale`, group by group.

    codes_OI: uint8 `[O, I]`, `0 <= code <= scheme.max_code`. scale_OG: float16 `[O, G]`, finite and > 0.
    zero_point_OG: uint8 `[O, G]`, all `scheme.symmetric_zero_point` when symmetric.
    """

    codes_OI: Tensor
    scale_OG: Tensor
    zero_point_OG: Tensor
    scheme: Scheme

    def __post_init__(self) -> None:
        out_features, in_features = self.codes_OI.shape
        shape_OG = (out_features, self.scheme.groups(in_features))
        assert self.codes_OI.dtype == self.zero_point_OG.dtype == torch.uint8
        assert self.scale_OG.dtype == torch.float16
        assert tuple(self.scale_OG.shape) == tuple(self.zero_point_OG.shape) == shape_OG

    @classmethod
    def from_parts(cls, q_OGg: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> QuantizedWeight:
        """From the float tensors that `numerics.quantize` and `scale_and_zero` return."""
        return cls(
            codes_OI=q_OGg.reshape(q_OGg.shape[0], -1).to(torch.uint8),
            scale_OG=scale.to(torch.float16),
            zero_point_OG=zero_point.to(torch.uint8),
            scheme=scheme,
        )

    def check(self, name: str) -> None:
        """Raise ArtifactError when a value is outside what the format can hold."""
        if not bool(torch.isfinite(self.scale_OG).all()) or bool((self.scale_OG <= 0).any()):
            raise ArtifactError(
                f"{name}: a scale is not a positive finite float16; its weights are damaged or too large"
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
        """Bytes as packed: codes and zero points at num_bits each, scales at 16."""
        bits = self.scheme.num_bits * (self.codes_OI.numel() + self.zero_point_OG.numel())
        return bits // 8 + 2 * self.scale_OG.numel()
