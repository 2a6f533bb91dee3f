"""All that may be chosen for a model, with what each choice takes in bytes and is predicted to cost; the best of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from compress import stage
from compress.errors import ConfigError
from compress.model import StreamedModel
from compress.plan import DENSE, LayerPlan, LayerScheme, outside_blocks
from compress.quantize.knapsack import Item, Table
from compress.quantize.menu import Menu, group_bytes, kind, label

# Points of a frontier between its ends.
POINTS = 24


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen for a budget. kl: predicted, nats a token. num_bytes: of all weights of the artifact, at most."""

    plan: LayerPlan
    labels: tuple[str, ...]
    kl: float
    num_bytes: int


@dataclass(frozen=True)
class Choices:
    """All choices of a model: what was measured, and what each takes.

    plan: `base_plan`. found: of `sensitivity.measure`. shapes: of the plan's linears. outside: bytes of all that is not
    chosen for.
    """

    menu: Menu
    plan: LayerPlan
    found: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, int]]
    outside: int

    @classmethod
    def of(cls, menu: Menu, model: StreamedModel, plan: LayerPlan, found: Mapping[str, Any]) -> Choices:
        """Of what was measured of a model."""
        shapes = stage.shapes_of(model, plan)
        measured = {name for one in found["sets"] for name in one["layers"]}
        return cls(menu, plan, found, shapes, bytes_outside(model, measured))

    @cached_property
    def options(self) -> list[list[LayerScheme]]:
        """Of each set, in the order in which it was measured."""
        sizes = [self.shapes[one["layers"][0]][1] for one in self.found["sets"]]
        return [self.menu.options(columns) for columns in sizes]

    @cached_property
    def items(self) -> list[Item]:
        """The sets as the knapsack takes them."""
        return [
            Item(
                sizes=tuple(group_bytes(option, one["layers"], self.shapes) for option in options),
                costs=tuple(float(one["kl"][label(option)]) for option in options),
            )
            for one, options in zip(self.found["sets"], self.options, strict=True)
        ]

    @cached_property
    def table(self) -> Table:
        return Table(self.items)

    @property
    def least(self) -> int:
        """Bytes of the smallest artifact there is."""
        return self.outside + self.table.least

    @property
    def most(self) -> int:
        """Bytes of the largest."""
        return self.outside + self.table.most

    def within(self, budget: int) -> Choice:
        """The best choice of at most so many bytes. ConfigError, with the least, when there is none."""
        chosen = self.table.choose(budget - self.outside)
        if chosen is None:
            raise ConfigError(
                f"{budget / 1e6:.2f} MB are too few: the smallest that can be chosen takes {self.least / 1e6:.2f} MB, "
                f"of which {self.outside / 1e6:.2f} MB are not quantized; ask for more, or prune first"
            )
        return self._choice(chosen)

    def uniform(self) -> dict[str, Choice]:
        """Artifacts of one scheme, by its kind: what everybody makes. Only those that all sets of the blocks may
        become; the output matrix stays in float16 where it may."""
        names = [{kind(o): i for i, o in enumerate(options)} for options in self.options]
        behind = [DENSE in options and any(map(outside_blocks, one["layers"]))
                  for one, options in zip(self.found["sets"], self.options, strict=True)]  # fmt: skip
        inside = [places for places, out in zip(names, behind, strict=True) if not out]
        common = [name for name in inside[0] if all(name in others for others in inside)] if inside else []
        return {
            name: self._choice(
                [places[kind(DENSE) if out else name] for places, out in zip(names, behind, strict=True)]
            )
            for name in common
        }

    def frontier(self, points: int = POINTS) -> list[Choice]:
        """The best choices within the bytes of every uniform one, and at even distances on a logarithmic scale."""
        low, high = max(1, self.table.least), max(1, self.table.most)
        budgets = {self.outside + round(low * (high / low) ** (i / (points - 1))) for i in range(points)}
        budgets |= {choice.num_bytes for choice in self.uniform().values()}
        return [self.within(max(self.least, min(self.most, budget))) for budget in sorted(budgets)]

    def smallest_below(self, kl: float) -> Choice:
        """The smallest choice that is predicted to diverge by at most `kl`; else the best there is."""
        low, high = self.least, self.most
        if self.within(low).kl <= kl:
            return self.within(low)
        while high - low > max(1, self.table.step):
            middle = (low + high) // 2
            low, high = (low, middle) if self.within(middle).kl <= kl else (middle, high)
        return self.within(high)

    def _choice(self, chosen: Sequence[int]) -> Choice:
        layers = dict(self.plan.layers)
        labels, kl, total = [], 0.0, self.outside
        for option, one, options, item in zip(chosen, self.found["sets"], self.options, self.items, strict=True):
            layers.update(dict.fromkeys(one["layers"], options[option]))
            labels.append(label(options[option]))
            kl += item.costs[option]
            total += item.sizes[option]
        measured = {name for one in self.found["sets"] for name in one["layers"]}
        layers.update({name: DENSE for name in self.plan.quantized if name not in measured})
        return Choice(plan=LayerPlan(layers), labels=tuple(labels), kl=kl, num_bytes=total)


def bytes_outside(model: StreamedModel, chosen_for: set[str]) -> int:
    """Bytes of every tensor of an artifact but the weights that are chosen for, floats at two bytes a number."""
    total = 0
    for name, info in model.checkpoint.tensors.items():
        if name.removesuffix(".weight") in chosen_for and name.endswith(".weight"):
            continue
        total += info.num_bytes if info.dtype.startswith(("I", "U", "BOOL")) else 2 * math.prod(info.shape)
    return total
