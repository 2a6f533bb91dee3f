"""What passes between the loop over blocks, a method, and the store of finished blocks.

Shapes: B batch, T tokens, H hidden size
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from compress.groups import Group
from compress.quantized import QuantizedWeight, StaticInput
from compress.statistics import InputStatistics


@dataclass(frozen=True, kw_only=True)
class LoadedBlock:
    """A block as a method sees it. `run()` returns its output on `check_input` with the weights as they are now.

    index, prefix: its number in the model that is read, and what the names of its tensors there begin with.
    check_input, check_output: `[B, T, H]`, a few calibration rows as they enter this block, and its output on them with
    its original weights. inputs, targets: with two paths, all rows as they enter this block, batch by batch, and what
    the original model has where the next block that goes on begins (or, behind the last, its final hidden states); else
    empty. sources: all rows as they enter this block in the original model, if wanted. forward(hidden, weights): the
    block's output with some parameters replaced, by name; differentiable. cache_errors(): what an INT8 KV cache costs
    the block as its weights are now, see `kv_cache.relative_errors`.
    """

    index: int
    prefix: str
    module: nn.Module
    groups: list[Group]
    statistics: list[InputStatistics]
    run: Callable[[], Tensor]
    check_input: Tensor
    check_output: Tensor
    inputs: list[Tensor]
    targets: list[Tensor]
    sources: list[Tensor]
    forward: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    cache_errors: Callable[[], dict[str, float]]


@dataclass(kw_only=True)
class BlockResult:
    """What a method made of a block: integer weights by layer name, other tensors (as stored) by parameter name.

    inputs: calibrated quantizers of the inputs of those layers whose plan says so. report: JSON for the manifest: one
    entry a layer, one a group. Tensors may have other shapes than the block's had.
    """

    quantized: dict[str, QuantizedWeight]
    dense: dict[str, Tensor]
    inputs: dict[str, StaticInput] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


class BlockStore(Protocol):
    """Where finished blocks go, and come back from when a run is resumed."""

    def load(self, index: int) -> BlockResult | None:
        """The block if it was finished before, else None."""

    def save(self, index: int, prefix: str, result: BlockResult) -> None:
        """Keep the block durably; it must survive a crash once this returns."""


@dataclass(frozen=True, kw_only=True)
class BlockDone:
    """One block is done. index, total: its number in what is made, and how many that has; source: its number in the
    model that is read. `resumed`: read back, not computed."""

    index: int
    source: int
    total: int
    resumed: bool
    report: dict[str, Any]
