"""Which shape: a grid of those that meet a goal, ranked by what each cut costs alone, the best judged as a whole.

Costs of single cuts (blocks, neurons, heads, hidden channels), each measured with repair on text held out, are added up
to rank the shapes, which needs few measurements for many shapes. The sum is not believed: it chooses which shapes are
judged, cheapest first, and the divergence of the judged ones decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from compress.errors import ConfigError
from compress.prune.shape import Shape, multiple_of

# The smallest share of each that a search leaves, and how many widths of the hidden state it tries.
LEAST = {"blocks": 0.5, "intermediate": 0.25, "heads": 0.5, "hidden": 0.6}
HIDDEN_CHOICES = 3
AXES = ("blocks", "intermediate", "heads", "hidden")


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A shape that was judged: parameters, the sum of its cuts' own costs, and its divergence on rows held out.

    by_text: that of each kind of text, of which `divergence` is the mean.
    """

    shape: Shape
    parameters: int
    predicted: float
    divergence: float
    by_text: Mapping[str, float]

    def to_json(self) -> dict[str, object]:
        return {
            "shape": self.shape.to_json(),
            "parameters": self.parameters,
            "predicted": self.predicted,
            "divergence": self.divergence,
            "by_text": dict(self.by_text),
        }


def choices(old: Shape) -> dict[str, list[Shape]]:
    """By axis, the shapes in which only that axis is smaller; the original first."""
    found: dict[str, list[Shape]] = {}
    least = -(-old.blocks * LEAST["blocks"] // 1)
    found["blocks"] = [replace(old, blocks=n) for n in range(old.blocks, int(least) - 1, -1)]
    found["intermediate"] = [replace(old, intermediate=n) for n in _widths("intermediate", old.intermediate)]
    found["hidden"] = [replace(old, hidden=n) for n in _widths("hidden", old.hidden)][:HIDDEN_CHOICES]
    heads = {(old.heads, old.kv_heads)}
    per_group = old.heads // old.kv_heads
    heads |= {(old.kv_heads * n, old.kv_heads) for n in range(1, per_group + 1)}
    heads |= {(per_group * n, n) for n in range(1, old.kv_heads + 1)}
    few = sorted((pair for pair in heads if pair[0] >= old.heads * LEAST["heads"]), reverse=True)
    found["heads"] = [replace(old, heads=h, kv_heads=k) for h, k in few]
    return found


def _widths(name: str, width: int) -> Iterator[int]:
    yield width
    step = multiple_of(name, max(width, 1))
    smaller = -(-width // step) * step - step
    while smaller >= max(step, width * LEAST[name]):
        yield smaller
        smaller -= step


def grid(old: Shape, meets: Callable[[Shape], bool], allowed: Mapping[str, Sequence[Shape]]) -> list[Shape]:
    """For each number of blocks, heads and hidden channels, the shape of most neurons that meets the goal."""
    out = []
    for depth, heads, hidden in product(allowed["blocks"], allowed["heads"], allowed["hidden"]):
        for width in allowed["intermediate"]:
            shape = joined(depth, width, heads, hidden)
            if shape != old and meets(shape):
                out.append(shape)
                break
    return out


def joined(depth: Shape, width: Shape, heads: Shape, hidden: Shape) -> Shape:
    """The shape with each axis of the one that cuts it."""
    return Shape(
        blocks=depth.blocks,
        intermediate=width.intermediate,
        heads=heads.heads,
        kv_heads=heads.kv_heads,
        hidden=hidden.hidden,
    )


class Costs:
    """What cuts of single axes cost, measured at some points and interpolated between them by the share removed."""

    def __init__(self, old: Shape) -> None:
        self.old = old
        self.points: dict[str, dict[float, float]] = {axis: {0.0: 0.0} for axis in AXES}
        self.heads: dict[tuple[int, int], float] = {(old.heads, old.kv_heads): 0.0}

    def add(self, axis: str, shape: Shape, divergence: float) -> None:
        """A shape in which only `axis` is smaller, and its divergence."""
        if axis == "heads":
            self.heads[(shape.heads, shape.kv_heads)] = divergence
        else:
            self.points[axis][self._removed(axis, shape)] = divergence

    def _removed(self, axis: str, shape: Shape) -> float:
        before = getattr(self.old, axis)
        return 1 - getattr(shape, axis) / before if before else 0.0

    def predicted(self, shape: Shape) -> float:
        """The sum of what each axis costs alone."""
        total = self.heads.get((shape.heads, shape.kv_heads), float("inf"))
        for axis in ("blocks", "intermediate", "hidden"):
            total += _between(self.points[axis], self._removed(axis, shape))
        return total


def _between(points: Mapping[float, float], at: float) -> float:
    """Linear between neighbouring points; beyond the last, on along the last two; infinite where nothing is known."""
    known = sorted(points.items())
    if at <= 0:
        return 0.0
    if len(known) < 2:
        return float("inf")
    right = next((i for i, (x, _) in enumerate(known) if x >= at), len(known) - 1)
    (x0, y0), (x1, y1) = known[max(0, right - 1)], known[right]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


def probes(old: Shape, allowed: Mapping[str, Sequence[Shape]]) -> list[tuple[str, Shape]]:
    """The single cuts to measure: two of neurons, one of blocks and of hidden channels, every choice of heads."""
    out: list[tuple[str, Shape]] = []
    for axis in ("blocks", "intermediate", "hidden"):
        smaller = [s for s in allowed[axis] if s != old]
        if not smaller:
            continue
        places = {(len(smaller) - 1) // 2, len(smaller) - 1} if axis == "intermediate" else {(len(smaller) - 1) // 2}
        out += [(axis, smaller[i]) for i in sorted(places)]
    return out + [("heads", s) for s in allowed["heads"] if s != old]


def sized(value: int) -> str:
    """A size as the user would write it: `50M`, `1.2G`; see `size_of`."""
    scale, unit = next(
        ((scale, unit) for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= scale), (1, "")
    )
    return f"{value / scale:g}{unit}"


def size_of(text: str, option: str) -> int:
    """`50M`, `1.2B`, `2G` (bytes: G and B are both 10^9), `800k` or a plain number. ConfigError for anything else."""
    units = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
    body = text.strip().lower()
    scale = units.get(body[-1:], 1.0)
    try:
        value = float(body[:-1] if body[-1:] in units else body) * scale
    except ValueError:
        value = 0.0
    if not 0 < value < 1e18:
        raise ConfigError(f"{option} {text} is not a size; write it like 50M or 1.2G")
    return round(value)
