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
from compress.divergence import divergences
from compress.model import StreamedModel
from compress.prune.cut import Cut, cut_axis
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
    found: dict[str, float | None] = {}

    def method(loaded: LoadedBlock) -> BlockResult:
        result = prune_block(loaded, cut, options, stored_dtype(model, loaded.index))
        if loaded.index == cut.kept[-1]:
            found.update(final_divergence(model, loaded, result, cut, sample.held))
        return result

    for done in stream(
        model, sample.ids_NT, method, paths=2, wanted=WANTED, blocks=cut.kept, reshaping=reshaping_of(cut)
    ):
        tell.step(doing=f"block {done.index + 1} of {done.total}")
    held, fitted = found["held_out"], found["fitted"]
    return float("nan") if held is None else held, float(fitted or 0.0)


@torch.no_grad()
def final_divergence(
    model: StreamedModel, loaded: LoadedBlock, result: BlockResult, cut: Cut, held: int
) -> dict[str, float | None]:
    """KL of the pruned model, whose last block is loaded and done: on the `held` last batches, and on as many others.

    Of a narrower model, the channels that went count as zero in front of the original's last norm, which then divides
    by less than the pruned model's does.
    """
    times = cut.final_scale * (cut.shape.hidden / cut.old.hidden) ** 0.5
    weights = {n: v.float() if v.is_floating_point() else v for n, v in result.dense.items()}
    first = len(loaded.inputs) - held
    parts = {"held_out": range(first, len(loaded.inputs)), "fitted": range(min(first, max(1, held)))}
    found: dict[str, float | None] = {}
    for name, batches in parts.items():
        if not len(batches):
            found[name] = None
            continue
        with with_attributes(loaded.module, cut.attributes):
            ends = [loaded.forward(loaded.inputs[i], weights) for i in batches]
        originals = [loaded.targets[i] for i in batches]
        wide = [_widened(end, original, cut) for end, original in zip(ends, originals, strict=True)]
        [found[name]] = divergences(model, originals, [wide], times)
    return found


def _widened(end: Tensor, original: Tensor, cut: Cut) -> Tensor:
    if cut.channels is None:
        return end
    out = torch.zeros_like(original)
    out[..., cut.channels.to(out.device)] = end
    return out
