"""A quantized weight while its scales, and its codes if that is wanted, are learned: what is used is what is written.

    weight = (clamp(round(u), 0, max) - zero_point) * stored(scale * exp(l))
    du = dW * scale      where u is in the range of codes        dl = sum over the group of dW * weight

Learned codes are real numbers, in steps of the grid, that are rounded when they are used; the gradient passes the
rounding unchanged (straight-through, Bengio et al., arXiv:1308.3432). Scales are learned as logarithms of a factor,
in what the file's dtype holds of them; zero points stay. At the start every weight is exactly the file's.

Shapes: O out_features, I in_features, G groups along I, g group size
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress import numerics
from compress.quantized import QuantizedWeight
from compress.scheme import Scheme


class _Dequantize(torch.autograd.Function):
    """Keeps nothing for the backward pass but its inputs: codes, not weights."""

    @staticmethod
    def forward(
        ctx: Any, codes_OI: Tensor, log_OG: Tensor, scale_OG: Tensor, zero_OG: Tensor, scheme: Scheme, stored: Any
    ) -> Tensor:
        ctx.save_for_backward(codes_OI, log_OG, scale_OG, zero_OG)
        ctx.scheme, ctx.stored = scheme, stored
        return _weight(codes_OI, log_OG, scale_OG, zero_OG, scheme, stored)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes_OI, log_OG, scale_OG, zero_OG = ctx.saved_tensors
        scheme: Scheme = ctx.scheme
        grad_OGg = numerics.to_groups(grads[0].float(), scheme)
        grad_codes = None
        if ctx.needs_input_grad[0]:
            inside = (codes_OI > -0.5) & (codes_OI < scheme.max_code + 0.5)
            grad_codes = (grad_OGg * held_scale(log_OG, scale_OG, ctx.stored)[..., None]).flatten(1) * inside
        weight_OGg = numerics.to_groups(_weight(codes_OI, log_OG, scale_OG, zero_OG, scheme, ctx.stored), scheme)
        return grad_codes, (grad_OGg * weight_OGg).sum(-1), None, None, None, None


def dequantized(
    codes_OI: Tensor, log_OG: Tensor, scale_OG: Tensor, zero_OG: Tensor, scheme: Scheme, stored: torch.dtype
) -> Tensor:
    """The weight, float32 `[O, I]`, differentiable by `log_OG` and by real codes.

    codes_OI: real, or as the file has them (uint8). log_OG: logarithms of the scales' factors, float32. scale_OG,
    zero_OG: the file's, in float32. stored: the dtype that the file holds scales in.
    """
    found: Tensor = _Dequantize.apply(codes_OI, log_OG, scale_OG, zero_OG, scheme, stored)  # type: ignore[no-untyped-call]
    return found


@torch.library.custom_op(
    "compress::held_scale", mutates_args=(), schema="(Tensor log_OG, Tensor scale_OG, ScalarType stored) -> Tensor"
)
def held_scale(log_OG: Tensor, scale_OG: Tensor, stored: torch.dtype) -> Tensor:
    """The scales as the file will hold them, in float32.

    An operator of its own, because a compiler that fuses it computes on with what was not rounded to 16 bits.
    """
    scale_OG = (scale_OG * log_OG.exp()).clamp(numerics.MIN_SCALE, numerics.MAX_SCALE)
    return scale_OG.to(stored).float()


@held_scale.register_fake
def _(log_OG: Tensor, scale_OG: Tensor, stored: torch.dtype) -> Tensor:
    return torch.empty_like(scale_OG, dtype=torch.float32)


def as_stored(
    codes_OI: Tensor, log_OG: Tensor, scale_OG: Tensor, zero_OG: Tensor, scheme: Scheme, stored: torch.dtype
) -> QuantizedWeight:
    """What `dequantized` computes with, on the CPU, as the file holds it."""
    return QuantizedWeight(
        codes_OI=_whole(codes_OI, scheme).to("cpu", torch.uint8),
        scale_OG=held_scale(log_OG, scale_OG, stored).to("cpu", stored),
        zero_point_OG=zero_OG.to("cpu", torch.uint8),
        scheme=scheme,
    )


def _weight(
    codes_OI: Tensor, log_OG: Tensor, scale_OG: Tensor, zero_OG: Tensor, scheme: Scheme, stored: torch.dtype
) -> Tensor:
    codes_OGg = numerics.to_groups(_whole(codes_OI, scheme), scheme)
    return numerics.dequantize(codes_OGg, held_scale(log_OG, scale_OG, stored), zero_OG).flatten(1)


def _whole(codes_OI: Tensor, scheme: Scheme) -> Tensor:
    return codes_OI.round().clamp_(0, scheme.max_code) if codes_OI.is_floating_point() else codes_OI.float()
