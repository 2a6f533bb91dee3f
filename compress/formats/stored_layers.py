"""The only door to quantized layers as a folder stores them: which they are, their schemes, codes and dense weights.

Who goes through it need not know any format, and reads every format that there is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.errors import ConfigError, UnsupportedError
from compress.formats import awq_gemm, compressed_tensors
from compress.formats.format import Format, Shape
from compress.formats.second_reader import Again
from compress.plan import LayerPlan, LayerScheme
from compress.quantized import QuantizedWeight, StaticInput

FORMATS: dict[str, Format] = {awq_gemm.NAME: awq_gemm, compressed_tensors.NAME: compressed_tensors}


def format_named(name: str) -> Format:
    """The format called `name`. ConfigError that lists them."""
    if name not in FORMATS:
        raise ConfigError(f"weight format {name!r} is not known; there are {', '.join(FORMATS)}")
    return FORMATS[name]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A folder's quantized layers. format None and an empty plan: its weights are plain.

    plan: the quantized layers, by the checkpoint's names, as its config states them.
    """

    checkpoint: Checkpoint
    format: Format | None
    plan: LayerPlan

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the quantized layers, sorted."""
        return tuple(self.plan)

    def __contains__(self, layer: str) -> bool:
        return layer in self.plan

    def scheme(self, layer: str) -> LayerScheme:
        """What the folder's config says of a quantized layer."""
        return self.plan[layer]

    def weight(self, layer: str) -> QuantizedWeight:
        """One layer's codes, with their invariants checked. ArtifactError when the tensors do not fit."""
        q = self._format().read(self.parts(layer), self.plan[layer], layer)
        q.check(layer)
        return q

    def static(self, layer: str) -> StaticInput | None:
        """The calibrated quantizer of a layer's inputs, None where it has none."""
        scheme = self.plan[layer]
        if scheme.input is None or scheme.input.dynamic:
            return None
        static = self._format().read_static(self.parts(layer), scheme, layer)
        assert static is not None
        static.check(layer)
        return static

    def dense(self, layer: str) -> Tensor:
        """The weight that a reader computes with, float32 `[O, I]`."""
        return self._format().read(self.parts(layer), self.plan[layer], layer).dequantize()

    def shape(self, layer: str) -> Shape:
        """`(out_features, in_features)`, from headers."""
        return self._format().shape(self.checkpoint, layer, self.plan[layer])

    def part_names(self, layer: str) -> dict[str, str]:
        """Leaf -> name of the checkpoint's tensor, of all tensors that make up a quantized layer (no bias)."""
        names = {leaf: f"{layer}.{leaf}" for leaf in self._format().LEAVES}
        return {leaf: name for leaf, name in names.items() if name in self.checkpoint}

    def parts(self, layer: str) -> dict[str, Tensor]:
        """The tensors that make up a quantized layer, by leaf."""
        names = self.part_names(layer)
        found = self.checkpoint.read(names.values())
        return {leaf: found[name] for leaf, name in names.items()}

    def taken(self) -> set[str]:
        """Names of all tensors that are part of a quantized layer; every other tensor is what its name says."""
        return {name for layer in self.plan for name in self.part_names(layer).values()}

    def num_bytes(self, layer: str) -> int:
        """Bytes that a quantized layer takes in the folder."""
        return sum(self.checkpoint.info(name).num_bytes for name in self.part_names(layer).values())

    def dense_names(self) -> list[str]:
        """Names of all tensors that the folder can give as dense ones, `.weight` for a quantized layer's; sorted."""
        taken = self.taken()
        plain = [name for name in self.checkpoint.tensors if name not in taken]
        return sorted([*plain, *(f"{layer}.weight" for layer in self.plan)])

    def exact_plan(self) -> LayerPlan:
        """The plan with the codes looked at, where the config does not say whether they are symmetric.

        A scheme counts as symmetric when every layer that has it does.
        """
        out = self.plan
        for scheme, names in self.plan.groups().items():
            if scheme.weight is None or scheme.weight.symmetric:
                continue
            if all(self._format().is_symmetric(self.checkpoint, name, scheme) for name in names):
                found = replace(scheme, weight=replace(scheme.weight, symmetric=True))
                out = LayerPlan({**out.layers, **dict.fromkeys(names, found)}, out.kv)
        return out

    def read_again(self, layer: str) -> dict[str, Again]:
        """What a second reader finds in a layer; see `Format.read_again`."""
        return self._format().read_again(self.parts(layer), self.plan[layer])

    def _format(self) -> Format:
        assert self.format is not None
        return self.format


def stored(checkpoint: Checkpoint) -> Stored:
    """The folder's quantized layers. UnsupportedError, by name, for what its config states and nothing here reads."""
    config = checkpoint.config.get("quantization_config")
    if config is None:
        return Stored(checkpoint=checkpoint, format=None, plan=LayerPlan())
    method = config.get("quant_method")
    for format in FORMATS.values():
        if format.QUANT_METHOD == method:
            return Stored(checkpoint=checkpoint, format=format, plan=format.plan(config, checkpoint))
    raise UnsupportedError(
        f"{checkpoint.path}: quant_method {method!r} is not read; AutoAWQ gemm and compressed-tensors folders are"
    )
