"""How good a cut is: the very stage, run over the model with nothing stored, and the KL divergence on text held out.

Not a formula over sensitivities: those add up only while the damage is small, and shapes of equal size differ by far
more than their scores (anchors of the design: 0.25 to 0.57 MMLU). Some rows of each kind of text are not fitted on;
they follow both paths through all blocks and are compared at the end, kind by kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from compress.block import BlockResult, LoadedBlock
from compress.blocks import Reshaping, stream, with_attributes
from compress.divergence import divergences
from compress.model import StreamedModel
from compress.prune.cut import Cut, cut_axis
from compress.prune.kinds import Kinds, parts_of
from compress.prune.prune_block import PruneOptions, prune_block
from compress.statistics import Wanted
from compress.tell import SILENT, Tell

WANTED = Wanted(gram=False, sources=True)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Rows to fit and to judge on, int64 `[N, T]`, and which is which."""

    ids_NT: Tensor
    kinds: Kinds


def reshaping_of(cut: Cut) -> Reshaping:
    """What the pruned path needs beside smaller weights."""
    channels = cut.channels
    enter = None if channels is None else (lambda hidden: cut_axis(hidden, -1, channels))
    return Reshaping(enter=enter, attributes=cut.attributes)


def stored_dtype(model: StreamedModel, index: int) -> Callable[[str], torch.dtype]:
    """The dtype that a tensor of block `index` is stored in, by its name in the block."""
    prefix = model.block_prefix(index)
    return lambda name: model.checkpoint.dtype(prefix + name)


def judge(model: StreamedModel, sample: Sample, cut: Cut, options: PruneOptions, tell: Tell = SILENT) -> dict[str, Any]:
    """Divergence of the cut model from the original, see `final_divergence`."""
    options = replace(options, fitted=sample.kinds.fitted)
    found: dict[str, Any] = {}

    def method(loaded: LoadedBlock) -> BlockResult:
        result = prune_block(loaded, cut, options, stored_dtype(model, loaded.index))
        if loaded.index == cut.kept[-1]:
            found.update(final_divergence(model, loaded, result, cut, sample.kinds))
        return result

    for done in stream(
        model, sample.ids_NT, method, paths=2, wanted=WANTED, blocks=cut.kept, reshaping=reshaping_of(cut)
    ):
        tell.step(doing=f"block {done.index + 1} of {done.total}")
    return found


@torch.no_grad()
def final_divergence(
    model: StreamedModel, loaded: LoadedBlock, result: BlockResult, cut: Cut, kinds: Kinds
) -> dict[str, Any]:
    """Mean KL divergence of the pruned model from the original in nats a token; its last block is loaded and done.

    held_out: the mean over kinds of text, None where nothing is held out. by_text: that of the rows held out, by kind.
    fitted: of as many of the rows that were fitted on, None where there are none.
    """
    weights = {n: v.float() if v.is_floating_point() else v for n, v in result.dense.items()}

    def of(rows: Sequence[range]) -> float:
        pieces = [piece for some in rows for piece in parts_of(loaded.inputs, some)]
        with with_attributes(loaded.module, cut.attributes):
            ends = [loaded.forward(loaded.inputs[i][part], weights) for i, part in pieces]
        originals = [loaded.targets[i][part] for i, part in pieces]
        wide = [_widened(end, original, cut) for end, original in zip(ends, originals, strict=True)]
        return divergences(model, originals, [wide], _times(cut))[0]

    held = kinds.held
    most = sum(len(rows) for rows in held.values())
    seen = [rows[: max(1, most // len(kinds.fitted))] for rows in kinds.fitted]
    by_text = {name: of([rows]) for name, rows in held.items()}
    return {
        "held_out": sum(by_text.values()) / len(by_text) if by_text else None,
        "by_text": by_text,
        "fitted": of(seen) if seen else None,
    }


def _times(cut: Cut) -> float:
    """Of a narrower model, the channels that went count as zero in front of the original's last norm, which then
    divides by less than the pruned model's does."""
    return cut.final_scale * sqrt(cut.shape.hidden / cut.old.hidden)


def _widened(end: Tensor, original: Tensor, cut: Cut) -> Tensor:
    if cut.channels is None:
        return end
    out = torch.zeros_like(original)
    out[..., cut.channels.to(out.device)] = end
    return out
