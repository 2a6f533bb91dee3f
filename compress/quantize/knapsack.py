"""One option for each item, so that all sizes together fit a budget and all costs together are least.

Two ways, and the better of what they find. Dynamic programming over the budget, in buckets of bytes: `best[b]` is the
least cost of the items so far in `b` buckets; sizes are rounded up to whole buckets, so what is chosen always fits. It
is exact for few items, and one table answers every budget, but with many items the rounding adds up. Greedy steps,
along each item's lower convex hull by what they gain a byte: near the bound where items are many and each is small.
What is left over is spent on the single changes that gain most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Buckets between the smallest and the largest that can be chosen: rounding up costs an item half of one on average.
BUCKETS = 8192


@dataclass(frozen=True, kw_only=True)
class Item:
    """Options of which one is chosen: bytes and cost of each, in any order."""

    sizes: tuple[int, ...]
    costs: tuple[float, ...]

    @property
    def least(self) -> int:
        return min(self.sizes)

    @property
    def most(self) -> int:
        return max(self.sizes)


class Table:
    """The least cost for every budget, of a fixed list of items."""

    def __init__(self, items: Sequence[Item], buckets: int = BUCKETS) -> None:
        self.items = tuple(items)
        self.least = sum(item.least for item in self.items)
        self.most = sum(item.most for item in self.items)
        self.step = max(1, -(-(self.most - self.least) // buckets))
        self.last = -(-(self.most - self.least) // self.step) + len(self.items)
        best = np.zeros(self.last + 1)
        self._chosen: list[npt.NDArray[np.uint8]] = []
        for item in self.items:
            total = np.full(self.last + 1, np.inf)
            chosen = np.zeros(self.last + 1, dtype=np.uint8)
            for option in range(len(item.sizes)):
                taken = self._buckets(item, option)
                if taken > self.last:
                    continue
                found = np.full(self.last + 1, np.inf)
                found[taken:] = best[: self.last + 1 - taken] + item.costs[option]
                better = found < total
                total[better], chosen[better] = found[better], option
            best = total
            self._chosen.append(chosen)
        self._steps = sorted(
            (-gain / more, number, option, more)
            for number, item in enumerate(self.items)
            for gain, more, option in hull_steps(item)
        )

    def choose(self, budget: int) -> list[int] | None:
        """The option of each item; None when not even the smallest of all fit the budget (bytes of all items)."""
        if budget < self.least:
            return None
        found = [self._improved(chosen, budget) for chosen in (self._by_table(budget), self._by_steps(budget))]
        return min(found, key=lambda chosen: (cost(self.items, chosen), size(self.items, chosen)))

    def _by_table(self, budget: int) -> list[int]:
        at = min(self.last, (budget - self.least) // self.step)
        out = [0] * len(self.items)
        for number in range(len(self.items) - 1, -1, -1):
            out[number] = int(self._chosen[number][at])
            at -= self._buckets(self.items[number], out[number])
        return out

    def _by_steps(self, budget: int) -> list[int]:
        out = [item.sizes.index(item.least) for item in self.items]
        left = budget - self.least
        for _, number, option, more in self._steps:
            if more > left:
                break
            out[number], left = option, left - more
        return out

    def _buckets(self, item: Item, option: int) -> int:
        return -(-(item.sizes[option] - item.least) // self.step)

    def _improved(self, chosen: list[int], budget: int) -> list[int]:
        """Spend what is left: each time the one change that saves most cost and fits; of equal cost, the smaller."""
        left = budget - size(self.items, chosen)
        while True:
            best: tuple[float, int, int, int] | None = None
            for number, item in enumerate(self.items):
                now = chosen[number]
                for option in range(len(item.sizes)):
                    more = item.sizes[option] - item.sizes[now]
                    change = (item.costs[option] - item.costs[now], more, number, option)
                    if more <= left and change[:2] < (0.0, 0) and (best is None or change < best):
                        best = change
            if best is None:
                return chosen
            chosen[best[2]] = best[3]
            left -= best[1]


def hull_steps(item: Item) -> list[tuple[float, int, int]]:
    """Along an item's lower convex hull from its smallest option: gain, more bytes, and the option that is reached."""
    kept: list[tuple[int, float, int]] = []
    for point in sorted((s, c, i) for i, (s, c) in enumerate(zip(item.sizes, item.costs, strict=True))):
        if kept and point[1] >= kept[-1][1]:
            continue
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) >= _slope(kept[-1], point):
            kept.pop()
        kept.append(point)
    return [(a[1] - b[1], b[0] - a[0], b[2]) for a, b in zip(kept, kept[1:], strict=False)]


def _slope(a: tuple[int, float, int], b: tuple[int, float, int]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def size(items: Sequence[Item], chosen: Sequence[int]) -> int:
    """Bytes of what is chosen."""
    return sum(item.sizes[option] for item, option in zip(items, chosen, strict=True))


def cost(items: Sequence[Item], chosen: Sequence[int]) -> float:
    """Cost of what is chosen."""
    return sum(item.costs[option] for item, option in zip(items, chosen, strict=True))
