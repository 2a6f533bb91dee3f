"""Quantization-aware distillation: a quantized folder's codes and scales trained, and written back in its own format.

Each quantized linear holds its codes as real numbers ("latent" codes) and the logarithms of its scales' factors; see
`learned`. At the start every weight is exactly the folder's, so the run goes on from what error feedback and tuning
found, and at the end the codes are the rounded latent ones: what was trained is what is written.

Quantized inputs (W8A8) are rounded by `activations.fake_quantize` and passed straight through as well.

Shapes: O out_features, I in_features, G groups along I, g group size
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compress import learned
from compress.activations import fake_quantize
from compress.distill.models import LoadedModel
from compress.errors import ConfigError, UnsupportedError
from compress.plan import ActivationScheme, LayerScheme
from compress.quantized import QuantizedWeight, StaticInput

LATENT, FACTOR = "latent_OI", "factor_OG"
# Rates as shares of the run's, which counts in steps of the grid: a scale's is relative, other parameters are of the
# order of a hundredth of a step.
RATES = {LATENT: 1.0, FACTOR: 0.1}
OTHER_RATE = 0.02
# A latent code's gradient is a weight's times a step of the grid: at INT8 it would come near AdamW's usual 1e-8.
EPS = 1e-12


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
        return learned.dequantized(
            self.latent_OI,
            self.factor_OG,
            self.get_buffer("scale_OG"),
            self.get_buffer("zero_OG"),
            self.scheme,
            self.stored_dtype,
        )

    def quantized(self, latent_OI: Tensor, factor_OG: Tensor) -> QuantizedWeight:
        """The codes and scales of a state, on the CPU, as the file holds them."""
        scale_OG, zero_OG = (self.get_buffer(name).to(factor_OG.device) for name in ("scale_OG", "zero_OG"))
        return learned.as_stored(latent_OI, factor_OG, scale_OG, zero_OG, self.scheme, self.stored_dtype)


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
        linear = LearnedLinear(stored.weight(layer), module.bias, scheme.input, stored.static(layer))
        owner, _, leaf = name.rpartition(".")
        setattr(loaded.model.get_submodule(owner), leaf, linear.to(module.weight.device))


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
