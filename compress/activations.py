"""Integer activations: how a linear's inputs become codes, and the product that a matrix unit takes of two codes.

The rules are those of the engines that run such models, so that what is judged is what is served:

    per token, symmetric    scale = amax / 127         q = round(x * (127 / amax))
    per token, asymmetric   scale = (max - min) / 255  q = round(x / scale) + zero_point, which is round(-min / scale)
    per tensor, static      both calibrated, stored    q = round(x / scale) + zero_point, clamped

rounding half to even (vLLM, `csrc/quantization/compressed_tensors/int8_quant_kernels.cu`). Codes are given as int8, the
unsigned ones less 128. Products of codes are summed exactly, as int32: in float32 matrix products over so few inputs
that no sum leaves the integers that float32 holds, on a GPU by its integer unit.

Shapes: T tokens, I in_features, O out_features, G groups along I
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.plan import ActivationScheme
from compress.quantized import QuantizedWeight, StaticInput

# |code| <= 128, so sums of this many products stay within 2**24, up to which float32 holds every integer.
EXACT_INPUTS = 2**24 // (128 * 128)
# What `torch._int_mm` asks of a GPU's operands: more rows than this, and sizes that are multiples of 8.
_INT_MM_ROWS = 17
_INSTALLED = "_compress_quantizes_inputs"


@dataclass(frozen=True, kw_only=True)
class QuantizedInputs:
    """Inputs as codes: `x ~= (q_TI - zero_point_T) * scale_T`.

    q_TI: int8. scale_T: float32, of one token each, or all equal. zero_point_T: int32 in terms of `q_TI`, None when 0.
    """

    q_TI: Tensor
    scale_T: Tensor
    zero_point_T: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The inputs as the codes have them, float32 `[T, I]`."""
        q = self.q_TI.float()
        if self.zero_point_T is not None:
            q = q - self.zero_point_T.float().unsqueeze(1)
        return q * self.scale_T.unsqueeze(1)


def quantize_inputs(x_TI: Tensor, scheme: ActivationScheme, static: StaticInput | None = None) -> QuantizedInputs:
    """Codes of the inputs `[T, I]` by the module's rules. `static` is needed exactly when the scheme is not dynamic."""
    assert (static is None) == scheme.dynamic
    x = x_TI.float()
    if static is not None:
        return _by_tensor(x, static)
    return _by_token_symmetric(x) if scheme.symmetric else _by_token(x)


def fake_quantize(x: Tensor, scheme: ActivationScheme, static: StaticInput | None = None) -> Tensor:
    """What inputs `[..., I]` are after being quantized and read back; same shape and dtype."""
    codes = quantize_inputs(x.reshape(-1, x.shape[-1]), scheme, static)
    return codes.dequantize().reshape(x.shape).to(x.dtype)


def _by_token_symmetric(x_TI: Tensor) -> QuantizedInputs:
    amax_T = x_TI.abs().amax(dim=1)
    inverse_T = torch.nan_to_num(127 / amax_T, posinf=0.0)  # a token of zeros, or as good as that
    q = (x_TI * inverse_T.unsqueeze(1)).round_().clamp_(-128, 127)
    return QuantizedInputs(q_TI=q.to(torch.int8), scale_T=amax_T / 127)


def _by_token(x_TI: Tensor) -> QuantizedInputs:
    lo_T, hi_T = x_TI.amin(dim=1), x_TI.amax(dim=1)
    scale_T = (hi_T - lo_T) / 255
    # A token of equal values has no range: one code of its own size, or, all zero, any.
    flat_T = scale_T == 0
    scale_T = torch.where(flat_T, torch.where(lo_T == 0, torch.ones_like(lo_T), lo_T.abs()), scale_T)
    zero_T = torch.where(flat_T, torch.zeros_like(lo_T), (-128 - lo_T / scale_T).round())
    q = (x_TI / scale_T.unsqueeze(1)).round_().add_(zero_T.unsqueeze(1)).clamp_(-128, 127)
    return QuantizedInputs(q_TI=q.to(torch.int8), scale_T=scale_T, zero_point_T=zero_T.to(torch.int32))


def _by_tensor(x_TI: Tensor, static: StaticInput) -> QuantizedInputs:
    scale = static.scale.to(x_TI.device, torch.float32)
    zero = static.zero_point.to(x_TI.device, torch.int32) - 128
    q = (x_TI / scale).round_().add_(zero).clamp_(-128, 127)
    num_tokens = x_TI.shape[0]
    return QuantizedInputs(
        q_TI=q.to(torch.int8),
        scale_T=scale.expand(num_tokens),
        zero_point_T=None if int(zero) == 0 else zero.expand(num_tokens),
    )


def integer_product(q_TI: Tensor, w_OI: Tensor) -> Tensor:
    """`q w^T` of int8 codes, exactly: int32 `[T, O]`."""
    if q_TI.is_cuda:
        return _integer_product_gpu(q_TI, w_OI)
    total_TO = torch.zeros(q_TI.shape[0], w_OI.shape[0], dtype=torch.int32, device=q_TI.device)
    for start in range(0, q_TI.shape[1], EXACT_INPUTS):
        part = slice(start, start + EXACT_INPUTS)
        total_TO += (q_TI[:, part].float() @ w_OI[:, part].float().t()).to(torch.int32)
    return total_TO


def _integer_product_gpu(q_TI: Tensor, w_OI: Tensor) -> Tensor:
    num_tokens, num_rows = q_TI.shape[0], w_OI.shape[0]
    more = (-q_TI.shape[1]) % 8
    q = torch.nn.functional.pad(q_TI, (0, more, 0, max(0, _INT_MM_ROWS - num_tokens)))
    w = torch.nn.functional.pad(w_OI, (0, more, 0, (-num_rows) % 8))
    product: Tensor = torch._int_mm(q.contiguous(), w.contiguous().t())
    return product[:num_tokens, :num_rows]


def linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, inputs: QuantizedInputs) -> Tensor:
    """The output `[..., O]` of a linear whose weight and inputs are codes, in the dtype of `x`.

    x gives the shape and the dtype; `inputs` are its codes. Of each group of weights, products are summed exactly, then
    scaled in float32; groups are added in float32, in order. Symmetric weights only.
    """
    w_OI = weight.signed_OI().to(x.device)
    scale_OG = weight.scale_OG.to(x.device, torch.float32)
    size = w_OI.shape[1] // scale_OG.shape[1]
    y_TO = torch.zeros(inputs.q_TI.shape[0], w_OI.shape[0], dtype=torch.float32, device=x.device)
    for group in range(scale_OG.shape[1]):
        part = slice(group * size, (group + 1) * size)
        sums_TO = integer_product(inputs.q_TI[:, part], w_OI[:, part])
        if inputs.zero_point_T is not None:
            row_sums_O = w_OI[:, part].sum(dim=1, dtype=torch.int32)
            sums_TO = sums_TO - inputs.zero_point_T.unsqueeze(1) * row_sums_O
        y_TO += sums_TO.float() * scale_OG[:, group]
    y_TO = y_TO * inputs.scale_T.unsqueeze(1)
    if bias is not None:
        y_TO = y_TO + bias.float()
    return y_TO.reshape(*x.shape[:-1], -1).to(x.dtype)


# ---- in a model ----------------------------------------------------------------------------------------


def install(
    module: nn.Module, weight: QuantizedWeight, scheme: ActivationScheme, static: StaticInput | None = None
) -> None:
    """Let a linear quantize its inputs, and multiply codes, as long as it holds the weight that it holds now.

    With another weight (`torch.func.functional_call`) it multiplies that with the inputs as their codes have them, and
    gradients pass the rounding as if it were not there. A weight that is changed in place goes unseen.
    """
    held = module._parameters["weight"]
    assert held is not None
    weight = QuantizedWeight(  # once, and not in every forward
        codes_OI=weight.codes_OI.to(held.device),
        scale_OG=weight.scale_OG.to(held.device),
        zero_point_OG=weight.zero_point_OG.to(held.device),
        scheme=weight.scheme,
    )

    def forward(x: Tensor) -> Tensor:
        bias = module._parameters.get("bias")
        now = module._parameters["weight"]
        if now is held:
            return linear(x, weight, bias, quantize_inputs(x.detach().reshape(-1, x.shape[-1]), scheme, static))
        seen = x + (fake_quantize(x.detach(), scheme, static) - x.detach())
        assert now is not None
        return torch.nn.functional.linear(seen, now, bias)

    uninstall(module)
    module.forward = forward
    setattr(module, _INSTALLED, True)


def uninstall(module: nn.Module) -> None:
    """Undo `install`; does nothing to a module that it was not done to."""
    if module.__dict__.pop(_INSTALLED, False):
        del module.forward
