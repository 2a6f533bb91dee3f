"""What is not quantized, as the folder holds it: tensors, and the config that names their dtype."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ArtifactError
from compress.model import StreamedModel
from compress.plan import LayerPlan


def to_stored(value: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """A tensor in `dtype` (integers unchanged). Raises ArtifactError for values that it cannot hold."""
    if not value.is_floating_point():
        return value.clone()
    stored = value.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        largest = float(value.abs().max())
        limit = torch.finfo(dtype).max
        said = str(dtype).removeprefix("torch.")
        reason = "is not finite" if math.isnan(largest) else f"reaches {largest:.4g}, beyond {said}'s {limit:.6g}"
        raise ArtifactError(f"tensor {name} {reason}; the artifact holds {said}, so this model cannot be one")
    return stored


def dense_tensors(module: nn.Module, prefix: str, quantized: Collection[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of a block but the weights of its quantized layers, as stored."""
    taken = {f"{name}.weight" for name in quantized}
    return {
        name: to_stored(value, prefix + name, dtype) for name, value in module.state_dict().items() if name not in taken
    }


def stored_config(dtype: torch.dtype, model: StreamedModel, plan: LayerPlan) -> dict[str, Any]:
    """The source's config.json with the dtype of what is not quantized."""
    config = dict(model.checkpoint.config)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    return config
