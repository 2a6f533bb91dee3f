"""Linear layers of a block: which they are, and their weights as `[out_features, in_features]`.

Shapes: O out_features, I in_features
"""

from __future__ import annotations

from torch import Tensor, nn


def is_linear(module: nn.Module) -> bool:
    """A matrix product with a stored weight: `nn.Linear`, or GPT-2's `Conv1D`, which stores it transposed."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def weight_OI(module: nn.Module) -> Tensor:
    """The layer's weight as `[out_features, in_features]`, a view."""
    weight = parameter(module, "weight")
    return weight.t() if is_conv1d(module) else weight


def parameter(module: nn.Module, name: str) -> Tensor:
    """A parameter's data by name."""
    value = module._parameters[name]
    assert value is not None
    return value.data


def set_weight_OI(module: nn.Module, w_OI: Tensor) -> None:
    """Overwrite the layer's weight in place."""
    weight_OI(module).copy_(w_OI)


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """The block's linear layers by name, in order of definition."""
    return {name: m for name, m in block.named_modules() if is_linear(m)}
