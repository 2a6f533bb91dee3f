"""What a format is: how the layers of a plan lie in a model folder.

A format is a module with the names below (see `awq_gemm`), one file each, and one line in `formats.FORMATS`. `tensors`
and `read`, and `config` and `plan`, are inverses of each other. Leaves are a tensor's name without its layer's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.plan import LayerPlan, LayerScheme
from compress.quantized import QuantizedWeight, StaticInput


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

    def check(self, plan: LayerPlan, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise UnsupportedError or ConfigError, with a way out, when the format cannot hold the plan's layers.

        shapes: `(out_features, in_features)` of every quantized layer.
        """
        ...

    def leaves(self, scheme: LayerScheme) -> tuple[str, ...]:
        """The tensors of a layer in this scheme, in the order in which they are written."""
        ...

    def tensors(self, weight: QuantizedWeight, scheme: LayerScheme, static: StaticInput | None) -> dict[str, Tensor]:
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

    def plan(self, config: Mapping[str, Any], checkpoint: Checkpoint) -> LayerPlan:
        """What a folder's `quantization_config` and tensors say that its layers are: quantized ones only.

        UnsupportedError, by name, for what is stated there and not computed here.
        """
        ...

    def digests(
        self, parts: Mapping[str, np.ndarray], scheme: LayerScheme, dtypes: Mapping[str, str]
    ) -> dict[str, str]:
        """What a second reader, that shares no code with `tensors` or `read`, finds in a layer's tensors.

        parts: raw arrays by leaf, 16-bit floats as int16. dtypes: torch's names of the tensors' own. Gives `codes`,
        `scales` and `zero_points` (and `input_scale`, `input_zero_point` where the inputs are static) as
        `shards.tensor_sha256` hashes what `QuantizedWeight` and `StaticInput` hold.
        """
        ...
