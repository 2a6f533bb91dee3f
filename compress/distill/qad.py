"""Quantization-aware distillation: a quantized folder's codes and scales trained, and written back in its own format.

Each quantized linear holds its codes as real numbers ("latent" codes, in steps of the grid) that are rounded when they
are used; the gradient passes the rounding unchanged (straight-through, Bengio et al., arXiv:1308.3432). Scales are
trained as logarithms of a factor, in what the file's dtype holds of them, zero points stay. At the start every weight
is exactly the folder's, so the run goes on from what error feedback and tuning found, and at the end the codes are the
rounded latent ones: what was trained is what is written.

    weight = (clamp(round(u), 0, max) - zero_point) * stored(scale * exp(l))
    du = dW * scale      where u is in the range of codes        dl = sum over the group of dW * weight

Quantized inputs (W8A8) are rounded by `activations.fake_quantize` and passed straight through as well.

Shapes: O out_features, I in_features, G groups along I, g group size
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress import numerics
from compress.activations import fake_quantize
from compress.distill.models import LoadedModel
from compress.errors import ConfigError, UnsupportedError
from compress.plan import ActivationScheme, LayerScheme
from compress.quantized import QuantizedWeight, StaticInput
from compress.scheme import Scheme

LATENT, FACTOR = "latent_OI", "factor_OG"
# Rates as shares of the run's, which counts in steps of the grid: a scale's is relative, other parameters are of the
# order of a hundredth of a step.
RATES = {LATENT: 1.0, FACTOR: 0.1}
OTHER_RATE = 0.02
# A latent code's gradient is a weight's times a step of the grid: at INT8 it would come near AdamW's usual 1e-8.
EPS = 1e-12


class _Dequantize(torch.autograd.Function):
    """The weight `[O, I]` of latent codes; keeps nothing for the backward pass but its inputs."""

    @staticmethod
    def forward(
        ctx: Any, latent_OI: Tensor, factor_OG: Tensor, scale_OG: Tensor, zero_OG: Tensor, scheme: Scheme, stored: Any
    ) -> Tensor:
        ctx.save_for_backward(latent_OI, factor_OG, scale_OG, zero_OG)
        ctx.scheme, ctx.stored = scheme, stored
        return _weight(latent_OI, factor_OG, scale_OG, zero_OG, scheme, stored)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        latent_OI, factor_OG, scale_OG, zero_OG = ctx.saved_tensors
        scheme: Scheme = ctx.scheme
        grad_OGg = numerics.to_groups(grads[0].float(), scheme)
        held_OG1 = held_scale(factor_OG, scale_OG, ctx.stored)[..., None]
        inside = (latent_OI > -0.5) & (latent_OI < scheme.max_code + 0.5)
        grad_latent = (grad_OGg * held_OG1).flatten(1) * inside
        weight_OGg = numerics.to_groups(_weight(latent_OI, factor_OG, scale_OG, zero_OG, scheme, ctx.stored), scheme)
        return grad_latent, (grad_OGg * weight_OGg).sum(-1), None, None, None, None


@torch.library.custom_op(
    "compress::held_scale", mutates_args=(), schema="(Tensor factor_OG, Tensor scale_OG, ScalarType stored) -> Tensor"
)
def held_scale(factor_OG: Tensor, scale_OG: Tensor, stored: torch.dtype) -> Tensor:
    """The scales as the file will hold them, in float32.

    An operator of its own, because a compiler that fuses it computes on with what was not rounded to 16 bits.
    """
    scale_OG = (scale_OG * factor_OG.exp()).clamp(numerics.MIN_SCALE, numerics.MAX_SCALE)
    return scale_OG.to(stored).float()


@held_scale.register_fake
def _(factor_OG: Tensor, scale_OG: Tensor, stored: torch.dtype) -> Tensor:
    return torch.empty_like(scale_OG, dtype=torch.float32)


def _weight(
    latent_OI: Tensor, factor_OG: Tensor, scale_OG: Tensor, zero_OG: Tensor, scheme: Scheme, stored: torch.dtype
) -> Tensor:
    codes_OGg = numerics.to_groups(latent_OI.round().clamp_(0, scheme.max_code), scheme)
    return numerics.dequantize(codes_OGg, held_scale(factor_OG, scale_OG, stored), zero_OG).flatten(1)


class LearnedLinear(nn.Module):
    """A quantized linear while it is trained. See the module docstring."""

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None, inputs: ActivationScheme | None, static: StaticInput | None
    ) -> None:
        super().__init__()
        self.scheme, self.stored_dtype = weight.scheme, weight.scale_OG.dtype
        self.inputs, self.static = inputs, static
        self.latent_OI = nn.Parameter(weight.codes_OI.float())
        self.factor_OG = nn.Parameter(torch.zeros_like(weight.scale_OG, dtype=torch.float32))
        self.register_buffer("scale_OG", weight.scale_OG.float())
        self.register_buffer("zero_OG", weight.zero_point_OG.float())
        self.bias = None if bias is None else nn.Parameter(bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs is not None:
            x = x + (fake_quantize(x.detach(), self.inputs, self.static) - x.detach())
        return nn.functional.linear(x, self.weight(), self.bias)

    def weight(self) -> Tensor:
        """Float32 `[O, I]`, differentiable."""
        found: Tensor = _Dequantize.apply(  # type: ignore[no-untyped-call]
            self.latent_OI,
            self.factor_OG,
            self.get_buffer("scale_OG"),
            self.get_buffer("zero_OG"),
            self.scheme,
            self.stored_dtype,
        )
        return found

    def quantized(self, latent_OI: Tensor, factor_OG: Tensor) -> QuantizedWeight:
        """The codes and scales of a state, on the CPU, as the file holds them."""
        held = held_scale(factor_OG, self.get_buffer("scale_OG").to(factor_OG.device), self.stored_dtype)
        return QuantizedWeight(
            codes_OI=latent_OI.round().clamp_(0, self.scheme.max_code).to("cpu", torch.uint8),
            scale_OG=held.to("cpu", self.stored_dtype),
            zero_point_OG=self.get_buffer("zero_OG").to("cpu", torch.uint8),
            scheme=self.scheme,
        )


def learn_codes(loaded: LoadedModel) -> None:
    """Replace every layer that the folder stores quantized by a `LearnedLinear`; all other parameters are trained too.

    ConfigError for a folder without quantized layers.
    """
    stored = loaded.stored
    if not stored.layers:
        raise ConfigError(
            f"{loaded.checkpoint.path} holds no quantized layer to train; pass a quantized artifact with --student, "
            "such as `compress awq --effort best` makes"
        )
    by_source = {source.removesuffix(".weight"): name for name, source in loaded.names.items()}
    for layer in stored.layers:
        name = by_source[layer].removesuffix(".weight")
        module = loaded.model.get_submodule(name)
        scheme = stored.scheme(layer)
        if not isinstance(module, nn.Linear) or scheme.weight is None:
            raise UnsupportedError(f"{layer} is a {type(module).__name__} in {scheme.label()}, which is not trained")
        learned = LearnedLinear(stored.weight(layer), module.bias, scheme.input, stored.static(layer))
        owner, _, leaf = name.rpartition(".")
        setattr(loaded.model.get_submodule(owner), leaf, learned.to(module.weight.device))


def check_scheme(loaded: LoadedModel, asked: str | None) -> None:
    """ConfigError unless a quantized folder's codes are asked to be trained, by the scheme that they have."""
    found = sorted({label(scheme) for scheme in loaded.stored.plan.groups()})
    path = loaded.checkpoint.path
    if not found and asked is not None:
        raise ConfigError(
            f"--scheme {asked} trains the codes of a quantized student and {path} holds none; pass --student the "
            "artifact that `compress awq` or `compress int8` made"
        )
    if found and asked not in found:
        trained = f"--scheme {asked} is asked for" if asked else "no --scheme is given"
        raise ConfigError(f"student {path} is quantized ({', '.join(found)}) and {trained}; pass --scheme {found[0]}")


def label(scheme: LayerScheme) -> str:
    """`w4a16`, `w8a8`: bits of weights and inputs."""
    weight = 16 if scheme.weight is None else scheme.weight.num_bits
    return f"w{weight}a{16 if scheme.input is None else scheme.input.num_bits}"


def rate_of(name: str) -> float:
    """A parameter's share of the run's rate, by its name."""
    return RATES.get(name.rpartition(".")[2], OTHER_RATE)


def quantized_layers(loaded: LoadedModel, state: Mapping[str, Tensor]) -> dict[str, QuantizedWeight]:
    """The trained layers, by the folder's names, from the model's whole state."""
    out = {}
    by_name = {name.removesuffix(".weight"): source.removesuffix(".weight") for name, source in loaded.names.items()}
    for name, module in loaded.model.named_modules():
        if isinstance(module, LearnedLinear):
            out[by_name[name]] = module.quantized(state[f"{name}.{LATENT}"], state[f"{name}.{FACTOR}"])
    return out
