"""Which blocks can go: the rise of KL divergence to the original when they are bypassed, measured again after each.

*Block influence*, one minus the mean cosine between a block's input and output (Men et al., "ShortGPT",
arXiv:2403.03853), costs one pass and orders the candidates; it does not decide. Of the least influential, the KL
divergence of the model without each is measured on calibration text, the best goes, and all is measured anew on the
model that is left (Song et al., "SLEB", arXiv:2402.09025, re-evaluate so, by perplexity). Whole runs of neighbours are
tried beside the blocks taken one by one (Gromov et al., arXiv:2403.17887, take the run whose ends are nearest in
angle). The first and the last block are not special: they are measured like any other.

A *sweep* runs every candidate at once: the hidden states that enter block i leave, in the model that bypasses it, as
those that enter block i + 1, so each candidate branches off there and only the blocks behind it run again. A sweep of a
large model waits for its blocks to be loaded, each once: so the runs share the first one, and the next begins where
the first candidate of the last branched off. Memory is one block and a set of hidden states a candidate, whatever the
depth.

Shapes: B batch, T tokens, H hidden size, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
# Candidates of a sweep, at most.
AT_ONCE = 24

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

    influence: of each block that was run, by candidate (`()` for the model as it stands). branch: hidden states where
    the first candidate leaves the model as it stands; those that enter, if there is none.
    """

    final: Batches
    candidates: dict[tuple[int, ...], Batches]
    influence: dict[tuple[int, ...], dict[int, float]]
    branch: Batches


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
    entering = model.embed_batches(ids_NT.split(batch))
    turned = SpanInfluence(range(2, remove + 1) if spans else ())
    whole = sweep(model, entering, everything, [], seen=turned.see, tell=tell)
    influence = whole.influence[()]
    runs = turned.least(spans)
    latest, kept, removals = dict(influence), everything, []
    run_costs: dict[tuple[int, int], float] = {}
    begin, states = 0, entering
    for _ in range(remove):
        order = sorted(kept, key=lambda i: (latest[i], i))[:candidates]
        alone: list[tuple[int, ...]] = [(i,) for i in sorted(order)]
        tried = sorted([*alone, *runs])
        if tried[0][0] < begin:
            begin, states = 0, entering
        costs, influences, states = _tried(model, whole.final, states, [i for i in kept if i >= begin], tried, tell)
        begin = tried[0][0]
        run_costs.update({(run[0], len(run)): costs[run] for run in runs})
        runs = []  # they are of the whole model
        best = min(alone, key=lambda c: (costs[c], c))
        kept = [i for i in kept if i not in best]
        latest.update(influences[best])
        removals.append(Removal(block=best[0], divergence=costs[best], tried={c[0]: costs[c] for c in alone}))
    return Depth(influence=[influence[i] for i in everything], removals=removals, spans=run_costs)


_Influences = dict[tuple[int, ...], dict[int, float]]


def _tried(
    model: StreamedModel,
    original: Batches,
    states: Batches,
    kept: Sequence[int],
    tried: Sequence[tuple[int, ...]],
    tell: Tell,
) -> tuple[dict[tuple[int, ...], float], _Influences, Batches]:
    """KL of the model without each of `tried` (ascending), the influences, and the states where the first begins.

    original: what leaves the whole model. states: what enters the first of the blocks `kept`.
    """
    costs: dict[tuple[int, ...], float] = {}
    influences: _Influences = {}
    branch: Batches = []
    for first in range(0, len(tried), AT_ONCE):
        some = tried[first : first + AT_ONCE]
        swept = sweep(model, states, kept, some, tell=tell)
        costs.update(zip(some, divergences(model, original, [swept.candidates[c] for c in some]), strict=True))
        influences.update(swept.influence)
        states, kept = swept.branch, [i for i in kept if i >= some[0][0]]
        branch = branch or states
    return costs, influences, branch


@torch.no_grad()
def sweep(
    model: StreamedModel,
    entering: Batches,
    kept: Sequence[int],
    candidates: Sequence[tuple[int, ...]],
    *,
    seen: Callable[[Tensor], None] = lambda hidden: None,
    tell: Tell = SILENT,
) -> Swept:
    """Run the blocks `kept`, in order, and beside them the same without each of `candidates` (runs of them).

    seen: called with the first batch as it enters, and as it leaves each block of the model as it stands.
    """
    base = list(entering)
    branch: Batches = []
    seen(base[0])
    paths: dict[tuple[int, ...], Batches] = {}
    influence: dict[tuple[int, ...], dict[int, float]] = {key: {} for key in [(), *candidates]}
    for position, index in enumerate(kept):
        model.load_block(index)
        if model.device.type == "cuda" and position + 1 < len(kept):
            model.prefetch_block(kept[position + 1])
        for candidate in candidates:
            if candidate[0] == index:
                branch = branch or list(base)
                paths[candidate] = list(base)
                influence[candidate] = dict(influence[()])
        for key, hidden in [((), base), *paths.items()]:
            if index not in key:
                influence[key][index] = _advance(model, index, hidden)
        seen(base[0])
        model.release_block(index)
        tell.step(doing=f"block {index + 1} of {model.num_blocks}")
    return Swept(final=base, candidates=paths, influence=influence, branch=branch or list(entering))


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


class SpanInfluence:
    """How far so many blocks in a row turn the hidden state of a batch, for each length and first block.

    `see` is called with the hidden state that enters the first block and with that which leaves each block.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.influence: dict[int, list[float]] = {length: [] for length in lengths}
        self._held: list[Tensor] = []

    def see(self, hidden: Tensor) -> None:
        """One more hidden state, `[B, T, H]`."""
        if not self.influence:
            return
        self._held.append(hidden)
        del self._held[: -max(self.influence) - 1]
        for length, found in self.influence.items():
            if len(self._held) > length:
                found.append(float(_turned(self._held[-1 - length], hidden).mean()))

    def least(self, most: int) -> list[tuple[int, ...]]:
        """The `most` runs of each length that turn it least, as the blocks that they consist of."""
        runs: list[tuple[int, ...]] = []
        for length, influence in self.influence.items():
            starts = sorted(range(len(influence)), key=lambda i: (influence[i], i))[:most]
            runs += [tuple(range(start, start + length)) for start in starts]
        return runs
