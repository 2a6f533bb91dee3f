"""A teacher's weights held as codes and made dense when a layer runs: half or a quarter of a 16-bit model's memory.

Shapes: O out_features, I in_features, G groups along I
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress import numerics
from compress.distill.models import LoadedModel
from compress.quantized import QuantizedWeight
from compress.scheme import Scheme

INT8 = Scheme(num_bits=8, group_size=-1, symmetric=True)


class HeldLinear(nn.Module):
    """A linear that computes with `(codes - zero_point) * scale` in its inputs' dtype; 4-bit codes lie two a byte."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.scheme = weight.scheme
        self.halves = weight.scheme.num_bits <= 4 and weight.codes_OI.shape[1] % 2 == 0
        codes = weight.codes_OI
        self.register_buffer("codes", codes[:, ::2] | (codes[:, 1::2] << 4) if self.halves else codes)
        self.register_buffer("scale_OG", weight.scale_OG.float())
        self.register_buffer("zero_point_OG", weight.zero_point_OG)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight(x.dtype), self.bias)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """`[O, I]`."""
        codes = self.get_buffer("codes")
        if self.halves:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
        steps_OGg = numerics.to_groups(codes, self.scheme).to(dtype) - self.get_buffer("zero_point_OG")[..., None].to(
            dtype
        )
        return (steps_OGg * self.get_buffer("scale_OG")[..., None].to(dtype)).flatten(1)


def hold(loaded: LoadedModel) -> None:
    """Replace the linears of the blocks: by the folder's own codes where it is quantized, else by INT8, one scale a
    row.

    INT8 rounding is far below what a student can learn of (W8A16).
    """
    inside = {id(m) for block in loaded.blocks for m in block.modules()}
    for name, module in list(loaded.model.named_modules()):
        if isinstance(module, nn.Linear) and id(module) in inside:
            layer = loaded.names[f"{name}.weight"].removesuffix(".weight")
            weight = loaded.stored.weight(layer) if layer in loaded.stored else in_int8(module.weight)
            held = HeldLinear(weight, module.bias).to(module.weight.device)
            owner, _, leaf = name.rpartition(".")
            setattr(loaded.model.get_submodule(owner), leaf, held)


def in_int8(weight_OI: Tensor) -> QuantizedWeight:
    """Rounded to nearest, symmetric, one scale a row that covers it."""
    w_OI = weight_OI.detach().float()
    scale_O1 = (w_OI.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-12)
    codes = (w_OI / scale_O1).round_().add_(INT8.symmetric_zero_point)
    return QuantizedWeight(
        codes_OI=codes.to(torch.uint8),
        scale_OG=scale_O1,
        zero_point_OG=torch.full_like(scale_O1, INT8.symmetric_zero_point, dtype=torch.uint8),
        scheme=INT8,
    )
