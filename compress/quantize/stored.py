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

# Rounding loses 2**-12 (float16) or 2**-9 (bfloat16) of a tensor; what loses more lies below the dtype's range.
_CAST_ERROR = 2**-6


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
    _refuse_underflow(value, stored, name)
    return stored


def _refuse_underflow(value: Tensor, stored: Tensor, name: str) -> None:
    """Raise ArtifactError for a tensor whose values `stored` rounds towards zero, since they are too small for it."""
    smallest = torch.finfo(stored.dtype).smallest_normal
    value = value.float() if value.element_size() == 1 else value  # float8 has no arithmetic of its own
    if not value.numel() or float(torch.linalg.vector_norm(value, ord=1)) >= smallest * value.numel():
        return
    peak = float(value.abs().max())
    if peak == 0:
        return
    exact = value.double() / peak  # squares of such values are zero in float32
    lost = float((stored.double() / peak - exact).norm() / exact.norm())
    if lost > _CAST_ERROR:
        said = str(stored.dtype).removeprefix("torch.")
        raise ArtifactError(
            f"tensor {name}: its values, at most {peak:.2g}, are too small for {said}, exact from {smallest:.2g} on, "
            f"which would lose {lost:.0%} of them; get the file again, or scale the tensor where the model allows it"
        )


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
