"""Which blocks can go: the rise of KL divergence to the original when they are bypassed, measured again after each.

*Block influence*, one minus the mean cosine between a block's input and output (Men et al., "ShortGPT",
arXiv:2403.03853), costs one pass and orders the candidates; it does not decide. Of the least influential, the KL
divergence of the model without each is measured on calibration text, the best goes, and all is measured anew on the
model that is left (Song et al., "SLEB", arXiv:2402.09025, re-evaluate so, by perplexity). Whole runs of neighbours are
tried beside the blocks taken one by one (Gromov et al., arXiv:2403.17887, take the run whose ends are nearest in
angle). The first and the last block are not special: they are measured like any other.

A *sweep* runs every candidate at once: the hidden states that enter block i leave, in the model that bypasses it, as
those that enter block i + 1, so each candidate branches off there and only the blocks behind it run again. A block is
loaded once a sweep, and memory is one block and a set of hidden states a candidate, whatever the depth.

Shapes: B batch, T tokens, H hidden size, V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.divergence import divergences
from compress.model import StreamedModel
from compress.tell import SILENT, Tell

# Candidates whose KL divergence is measured at each step, least influential first.
CANDIDATES = 8
# Runs of neighbours that are measured beside the blocks taken one by one.
SPANS = 3

Batches = list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Removal:
    """A step: the block that went (its number in the original), and then the mean KL to the original, nats a token.

    tried: what each candidate of that step would have cost, by block.
    """

    block: int
    divergence: float
    tried: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Depth:
    """What was measured. influence: of every block in the whole model. removals: one by one, in order.

    spans: runs of neighbours (first block, length) and their KL.
    """

    influence: list[float]
    removals: list[Removal]
    spans: dict[tuple[int, int], float]

    @property
    def num_blocks(self) -> int:
        return len(self.influence)

    def kept(self, remove: int) -> list[int]:
        """The blocks that stay when `remove` go, ascending: those taken one by one, or a run that costs less."""
        span = self._span(remove)
        if span is not None and self.spans[span] < self.removals[remove - 1].divergence:
            gone = set(range(span[0], span[0] + remove))
        else:
            gone = {removal.block for removal in self.removals[:remove]}
        return [i for i in range(self.num_blocks) if i not in gone]

    def divergence(self, remove: int) -> float:
        """KL of the model without those blocks, nothing refitted."""
        if not remove:
            return 0.0
        span = self._span(remove)
        one_by_one = self.removals[remove - 1].divergence
        return one_by_one if span is None else min(one_by_one, self.spans[span])

    def _span(self, length: int) -> tuple[int, int] | None:
        found = [key for key in self.spans if key[1] == length]
        return min(found, key=lambda key: (self.spans[key], key), default=None)

    def to_json(self) -> dict[str, Any]:
        """For the manifest; `from_json` reads it back."""
        return {
            "influence": self.influence,
            "removals": [
                {"block": r.block, "divergence": r.divergence, "tried": [[b, cost] for b, cost in r.tried.items()]}
                for r in self.removals
            ],
            "spans": [[first, length, cost] for (first, length), cost in self.spans.items()],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Depth:
        return cls(
            influence=list(value["influence"]),
            removals=[
                Removal(block=r["block"], divergence=r["divergence"], tried={b: cost for b, cost in r["tried"]})
                for r in value["removals"]
            ],
            spans={(first, length): cost for first, length, cost in value["spans"]},
        )


@dataclass(frozen=True, kw_only=True)
class Swept:
    """Hidden states that leave the last block: of the model as it stands, and of each candidate.

    influence: of each block that was run, by candidate (`()` for the model as it stands).
    """

    final: Batches
    candidates: dict[tuple[int, ...], Batches]
    influence: dict[tuple[int, ...], dict[int, float]]


def measure_depth(
    model: StreamedModel,
    ids_NT: Tensor,
    remove: int,
    *,
    batch: int,
    candidates: int = CANDIDATES,
    spans: int = SPANS,
    tell: Tell = SILENT,
) -> Depth:
    """Take up to `remove` blocks out, each time the one whose absence costs least on `ids_NT` (int64 `[N, T]`).

    batch: rows run at once. Runs of neighbours are measured for every length from two to `remove`. Deterministic.
    """
    everything = list(range(model.num_blocks))
    entering = model.embed_batches(ids_NT, batch)
    whole = sweep(model, entering, everything, [], tell=tell)
    latest = whole.influence[()]
    kept, removals = everything, []
    for _ in range(remove):
        order = sorted(kept, key=lambda i: (latest[i], i))[:candidates]
        chosen: list[tuple[int, ...]] = [(i,) for i in sorted(order)]
        swept = sweep(model, entering, kept, chosen, tell=tell)
        costs = divergences(model, whole.final, [swept.candidates[c] for c in chosen])
        best = min(range(len(chosen)), key=lambda i: (costs[i], chosen[i]))
        kept = [i for i in kept if i not in chosen[best]]
        latest = swept.influence[chosen[best]]
        tried = {c[0]: cost for c, cost in zip(chosen, costs, strict=True)}
        removals.append(Removal(block=chosen[best][0], divergence=costs[best], tried=tried))
    runs = _spans(model, entering, whole, range(2, remove + 1), spans, tell) if spans and remove > 1 else {}
    influence = whole.influence[()]
    return Depth(influence=[influence[i] for i in everything], removals=removals, spans=runs)


def _spans(
    model: StreamedModel, entering: Batches, whole: Swept, lengths: Sequence[int], most: int, tell: Tell
) -> dict[tuple[int, int], float]:
    """Of every length, KL of the `most` runs of neighbours whose ends are nearest in angle."""
    everything = list(range(model.num_blocks))
    chosen: list[tuple[int, ...]] = []
    for length, influence in span_influence(model, entering[:1], lengths).items():
        starts = sorted(range(len(influence)), key=lambda i: (influence[i], i))[:most]
        chosen += [tuple(range(start, start + length)) for start in sorted(starts)]
    out: dict[tuple[int, int], float] = {}
    for first in range(0, len(chosen), CANDIDATES):  # as many sets of hidden states at once as a removal needs
        some = chosen[first : first + CANDIDATES]
        swept = sweep(model, entering, everything, some, tell=tell)
        costs = divergences(model, whole.final, [swept.candidates[c] for c in some])
        out.update({(c[0], len(c)): cost for c, cost in zip(some, costs, strict=True)})
    return out


@torch.no_grad()
def sweep(
    model: StreamedModel,
    entering: Batches,
    kept: Sequence[int],
    candidates: Sequence[tuple[int, ...]],
    *,
    tell: Tell = SILENT,
) -> Swept:
    """Run the blocks `kept`, in order, and beside them the same without each of `candidates` (runs of them)."""
    base = list(entering)
    paths: dict[tuple[int, ...], Batches] = {}
    influence: dict[tuple[int, ...], dict[int, float]] = {key: {} for key in [(), *candidates]}
    for position, index in enumerate(kept):
        model.load_block(index)
        if model.device.type == "cuda" and position + 1 < len(kept):
            model.prefetch_block(kept[position + 1])
        for candidate in candidates:
            if candidate[0] == index:
                paths[candidate] = list(base)
                influence[candidate] = dict(influence[()])
        for key, hidden in [((), base), *paths.items()]:
            if index not in key:
                influence[key][index] = _advance(model, index, hidden)
        model.release_block(index)
        tell.step(doing=f"block {index + 1} of {model.num_blocks}")
    return Swept(final=base, candidates=paths, influence=influence)


def _advance(model: StreamedModel, index: int, hidden: Batches) -> float:
    """Run the loaded block on every batch, in place; returns its influence on them."""
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    tokens = 0
    for i, before in enumerate(hidden):
        after = model.run_block(index, before)
        total += _turned(before, after).sum(dtype=torch.float64)
        tokens += before.shape[0] * before.shape[1]
        hidden[i] = after
    return float(total) / tokens


def _turned(before: Tensor, after: Tensor) -> Tensor:
    """One minus the cosine between two hidden states of each token, `[B, T]`."""
    return 1 - torch.cosine_similarity(before.float(), after.float(), dim=-1)


@torch.no_grad()
def span_influence(model: StreamedModel, entering: Batches, lengths: Sequence[int]) -> dict[int, list[float]]:
    """How far so many blocks in a row turn the hidden state, for each length and first block; one pass."""
    held = [list(entering)]
    out: dict[int, list[float]] = {length: [] for length in lengths}
    for index in range(model.num_blocks):
        model.load_block(index)
        if model.device.type == "cuda" and index + 1 < model.num_blocks:
            model.prefetch_block(index + 1)
        held.append([model.run_block(index, h) for h in held[-1]])
        model.release_block(index)
        del held[: -max(lengths) - 1]
        for length in lengths:
            if len(held) > length:
                turned = [_turned(a, b).mean() for a, b in zip(held[-1 - length], held[-1], strict=True)]
                out[length].append(float(torch.stack(turned).mean()))
    return out
