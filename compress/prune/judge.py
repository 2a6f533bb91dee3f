"""How good a cut is: the very stage, run over the model with nothing stored, and the KL divergence on text held out.

Not a formula over sensitivities: those add up only while the damage is small, and shapes of equal size differ by far
more than their scores (anchors of the design: 0.25 to 0.57 MMLU). The last rows of the text are not fitted on; they
follow both paths through all blocks and are compared at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.block import BlockResult, LoadedBlock
from compress.blocks import Reshaping, stream, with_attributes
from compress.model import StreamedModel
from compress.prune.cut import Cut, cut_axis
from compress.prune.depth import divergences
from compress.prune.prune_block import PruneOptions, prune_block
from compress.statistics import Wanted
from compress.tell import SILENT, Tell

WANTED = Wanted(gram=False, sources=True)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Rows to judge on: int64 `[N, T]`, of which the last `held` batches of `batch` rows are not fitted on."""

    ids_NT: Tensor
    batch: int
    held: int

    @property
    def fitted(self) -> int:
        """Batches that are fitted on."""
        return -(-len(self.ids_NT) // self.batch) - self.held


def reshaping_of(cut: Cut) -> Reshaping:
    """What the pruned path needs beside smaller weights."""
    channels = cut.channels
    enter = None if channels is None else (lambda hidden: cut_axis(hidden, -1, channels))
    return Reshaping(enter=enter, attributes=cut.attributes)


def stored_dtype(model: StreamedModel, index: int) -> Callable[[str], torch.dtype]:
    """The dtype that a tensor of block `index` is stored in, by its name in the block."""
    prefix = model.block_prefix(index)
    return lambda name: model.checkpoint.dtype(prefix + name)


def judge(
    model: StreamedModel, sample: Sample, cut: Cut, options: PruneOptions, tell: Tell = SILENT
) -> tuple[float, float]:
    """Mean KL divergence from the original in nats a token: on the rows held out, and on those fitted on."""
    options = replace(options, fitted=sample.fitted)
    ends: list[Tensor] = []
    originals: list[Tensor] = []

    def method(loaded: LoadedBlock) -> BlockResult:
        result = prune_block(loaded, cut, options, stored_dtype(model, loaded.index))
        if loaded.index == cut.kept[-1]:
            weights = {n: v.float() if v.is_floating_point() else v for n, v in result.dense.items()}
            with with_attributes(loaded.module, cut.attributes):
                ends.extend(loaded.forward(h, weights) for h in loaded.inputs)
            originals.extend(loaded.targets)
        return result

    for done in stream(
        model, sample.ids_NT, method, paths=2, wanted=WANTED, blocks=cut.kept, reshaping=reshaping_of(cut)
    ):
        tell.step(doing=f"block {done.index + 1} of {done.total}")
    return compared(model, originals, ends, cut, sample)


def compared(
    model: StreamedModel, originals: list[Tensor], ends: list[Tensor], cut: Cut, sample: Sample
) -> tuple[float, float]:
    """The divergence of final hidden states, held out and fitted; of a narrower model, put back into their places."""
    wide = [_widened(end, original, cut) for end, original in zip(ends, originals, strict=True)]
    first = sample.fitted
    [held] = divergences(model, originals[first:], [wide[first:]]) if sample.held else [float("nan")]
    few = slice(0, max(1, sample.held))
    [fitted] = divergences(model, originals[few], [wide[few]])
    return held, fitted


def _widened(end: Tensor, original: Tensor, cut: Cut) -> Tensor:
    if cut.channels is None:
        return end
    out = torch.zeros_like(original)
    out[..., cut.channels.to(out.device)] = end
    return out
