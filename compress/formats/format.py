"""What a format is: how the layers of a plan lie in a model folder.

A format is a module with the names below (see `awq_gemm`), one file each, and one line in `formats.FORMATS`. `tensors`
and `read`, and `config` and `plan`, are inverses of each other. A tensor's *leaf* is its name without its layer's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.errors import ConfigError
from compress.formats.second_reader import Again
from compress.plan import LayerPlan, LayerScheme
from compress.quantized import QuantizedWeight, StaticInput
from compress.scheme import dividing

Shape = tuple[int, int]


class Format(Protocol):
    """See the module docstring."""

    @property
    def NAME(self) -> str:
        """As manifests and the command line call it: `awq-gemm`."""
        ...

    @property
    def QUANT_METHOD(self) -> str:
        """What `quantization_config` says of it under `quant_method`."""
        ...

    @property
    def LEAVES(self) -> tuple[str, ...]:
        """Every leaf that a quantized layer can have."""
        ...

    @property
    def CODES(self) -> tuple[str, ...]:
        """Those of them that no layer has but a quantized one, whatever the config says of it."""
        ...

    def check(self, plan: LayerPlan, shapes: Mapping[str, Shape]) -> None:
        """Raise UnsupportedError or ConfigError, with a way out, when the format cannot hold the plan's layers.

        shapes: `(out_features, in_features)` of every quantized layer.
        """
        ...

    def tensors(
        self, weight: QuantizedWeight, scheme: LayerScheme, static: StaticInput | None = None
    ) -> dict[str, Tensor]:
        """The file's tensors of one layer, by leaf. `static`: exactly for a scheme whose inputs are not dynamic."""
        ...

    def read(self, parts: Mapping[str, Tensor], scheme: LayerScheme, name: str) -> QuantizedWeight:
        """The layer's codes from its tensors by leaf. ArtifactError, naming the layer, when they do not fit."""
        ...

    def read_static(self, parts: Mapping[str, Tensor], scheme: LayerScheme, name: str) -> StaticInput | None:
        """The calibrated quantizer of the layer's inputs, None where the scheme has none."""
        ...

    def config(self, plan: LayerPlan) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        ...

    def layers(self, names: Iterable[str]) -> list[str]:
        """The layers that a folder with tensors of these names stores quantized, sorted."""
        ...

    def plan(self, config: Mapping[str, Any], checkpoint: Checkpoint) -> LayerPlan:
        """What a folder's `quantization_config` and tensors say that its layers are: quantized ones only, sorted.

        UnsupportedError, by name, for what is stated there and not computed here.
        """
        ...

    def shape(self, checkpoint: Checkpoint, layer: str, scheme: LayerScheme) -> Shape:
        """`(out_features, in_features)` of a stored layer."""
        ...

    def is_symmetric(self, checkpoint: Checkpoint, layer: str, scheme: LayerScheme) -> bool:
        """Whether a stored layer's codes are symmetric; looks at them where the config does not say."""
        ...

    def read_again(self, parts: Mapping[str, Tensor], scheme: LayerScheme) -> dict[str, Again]:
        """What a second reader, that shares no code with `tensors` or `read`, finds in a layer's tensors.

        Under `codes`, `scales` and `zero_points` what a `QuantizedWeight` holds, and under `input_scale` and
        `input_zero_point` what a `StaticInput` does.
        """
        ...


def parts_of(weight: QuantizedWeight, static: StaticInput | None = None) -> dict[str, Tensor]:
    """What `Format.read_again` must find."""
    parts = {"codes": weight.codes_OI, "scales": weight.scale_OG, "zero_points": weight.zero_point_OG}
    if static is not None:
        parts |= {"input_scale": static.scale, "input_zero_point": static.zero_point}
    return parts


def check_groups(plan: LayerPlan, shapes: Mapping[str, Shape]) -> None:
    """Raise ConfigError, with the sizes that do, when a layer's group size does not divide its inputs."""
    for name in plan.quantized:
        weight = plan[name].weight
        if weight is None or weight.group_size == -1 or shapes[name][1] % weight.group_size == 0:
            continue
        fitting = dividing(shapes[other][1] for other in plan.quantized)
        said = " or ".join(f"--group-size {size}" for size in fitting)
        way_out = f"{said} divides those of every layer" if said else f"leave it in float16 with --skip {name}"
        raise ConfigError(
            f"--group-size {weight.group_size} does not divide the {shapes[name][1]} inputs of {name}; {way_out}"
        )
