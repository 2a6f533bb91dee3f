"""The knapsack against every combination there is, and against the fractional bound where there are too many."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.quantize.knapsack import Item, Table, cost, size

items_of_few = st.lists(
    st.lists(st.tuples(st.integers(1, 900), st.floats(0, 10)), min_size=1, max_size=4, unique_by=lambda o: o[0]),
    min_size=1,
    max_size=5,
).map(lambda found: [Item(sizes=tuple(s for s, _ in one), costs=tuple(c for _, c in one)) for one in found])


@settings(max_examples=150, deadline=None)
@given(items_of_few, st.floats(0, 1.1))
def test_it_is_the_best_of_all_combinations(items: list[Item], share: float) -> None:
    """With a bucket a byte."""
    table = Table(items)
    budget = round(table.least + share * (table.most - table.least))
    chosen = table.choose(budget)
    every = [c for c in product(*(range(len(item.sizes)) for item in items)) if size(items, c) <= budget]
    assert chosen is not None and size(items, chosen) <= budget
    assert cost(items, chosen) == pytest.approx(min(cost(items, c) for c in every), abs=1e-9)
    assert table.choose(table.least - 1) is None


def layers(count: int) -> list[Item]:
    """Sets of linears as a model of billions of parameters has them: costs fall fourfold in all bits, unequally."""
    out = []
    for i in range(count):
        numbers = (7 + i % 5) * 10_000_019
        costs = [(1 + (i * 37 % 11) / 3) * 2.0**-step for step in (0, 0.5, 1.1, 8)] + [0.0]
        sizes = [int(numbers * bits / 8) for bits in (4.16, 4.31, 4.63, 8.13, 16)]
        out.append(Item(sizes=tuple(sizes), costs=tuple(costs)))
    return out


@pytest.mark.parametrize("share", [0.01, 0.05, 0.13, 0.4, 0.9])
def test_a_deep_model_comes_near_the_bound(share: float) -> None:
    """The bound: steps along each item's convex hull in the order of what they gain a byte, the last one in part."""
    items = layers(160)
    table = Table(items)
    budget = round(table.least + share * (table.most - table.least))
    chosen = table.choose(budget)
    assert chosen is not None
    bound = sum(max(item.costs) for item in items)
    left = float(budget - table.least)
    for gain, more in sorted((step for item in items for step in hull(item)), key=lambda s: -s[0] / s[1]):
        bound -= gain * min(1.0, max(0.0, left) / more)
        left -= more
    assert size(items, chosen) <= budget
    assert bound - 1e-6 <= cost(items, chosen) <= 1.01 * bound + 1e-3 * sum(max(item.costs) for item in items)


def hull(item: Item) -> list[tuple[float, int]]:
    """Gain and bytes of each step of an item's lower convex hull."""
    points = sorted(zip(item.sizes, item.costs, strict=True))
    kept = [points[0]]
    for point in points[1:]:
        while len(kept) > 1 and slope(kept[-2], kept[-1]) > slope(kept[-1], point):
            kept.pop()
        kept.append(point)
    return [(a[1] - b[1], b[0] - a[0]) for a, b in zip(kept, kept[1:], strict=False)]


def slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def test_more_bytes_never_cost_more() -> None:
    table = Table(layers(40))
    budgets = [table.least + i * (table.most - table.least) // 60 for i in range(61)]
    costs = [cost(table.items, table.choose(budget) or []) for budget in budgets]
    assert all(later <= earlier * 1.0005 for earlier, later in zip(costs, costs[1:], strict=False))
    assert costs[-1] == 0
