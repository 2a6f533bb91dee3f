"""Which rows of a block's linears feed which input channels of another: read off the running block, never named.

Two linears of a decoder block read what the block itself made: the attention's output projection and the MLP's. Their
input channels are made of *units*: neurons of one channel, or heads of `head_dim` channels. A unit can go when the rows
that feed it feed nothing else. So a linear's outputs are multiplied by random factors, the block runs on a few tokens,
and the channels that changed are noted. That finds gate and up, stacked or apart, query heads within their key and
value heads, fused or not, and biases with them, by one rule; and it refuses what mixes channels (a norm across heads).

A change of every channel at once is *dense*: it comes through a norm and says nothing.

Shapes: I input channels of the consumer, R rows of a producer, S rows of a segment of it, U units
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.linear import linears, weight_OI

# A channel has changed when the energy of its change is more than this share of its own; what a row does not feed
# differs by float32 noise at most.
_CHANGED = 1e-9


@dataclass(frozen=True, kw_only=True)
class Producer:
    """A linear whose rows feed units, `run_rows` rows at a time.

    feeds: with one row a run, int64 `[R]`, the unit that each row feeds; else bool `[R / run_rows, U]`.
    """

    name: str
    run_rows: int
    feeds: Tensor

    def kept_rows(self, kept_U: Tensor) -> Tensor:
        """Rows that feed any unit of `kept_U` (bool `[U]`), ascending; int64."""
        if self.run_rows == 1:
            return kept_U[self.feeds].nonzero().flatten()
        runs = (self.feeds & kept_U).any(dim=1)
        return runs.repeat_interleave(self.run_rows).nonzero().flatten()


@dataclass(frozen=True, kw_only=True)
class Section:
    """A linear that reads units, and those that make them. group_U: int64 `[U]`, which units share a producer's rows.

    Groups are numbered by their first unit. Neurons are groups of their own; heads share keys and values. adds: whether
    the consumer's outputs are added to the hidden state as they are (a norm may stand between).
    """

    consumer: str
    unit_size: int
    group_U: Tensor
    producers: tuple[Producer, ...]
    adds: bool = True

    @property
    def num_units(self) -> int:
        return len(self.group_U)

    @property
    def num_groups(self) -> int:
        return int(self.group_U.max()) + 1

    def channels(self, units: Tensor) -> Tensor:
        """The consumer's input channels of `units` (int64), in their order; int64."""
        return (units.unsqueeze(1) * self.unit_size + torch.arange(self.unit_size)).flatten()

    def kept_rows(self, units: Tensor) -> dict[str, Tensor]:
        """For each producer the rows to keep when only `units` (int64) stay."""
        kept_U = torch.zeros(self.num_units, dtype=torch.bool)
        kept_U[units] = True
        return {producer.name: producer.kept_rows(kept_U) for producer in self.producers}


@dataclass(frozen=True, kw_only=True)
class Structure:
    """The sections found in a block; None for one that was not."""

    neurons: Section | None
    heads: Section | None


def find_structure(block: nn.Module, run: Callable[[], Tensor], head_dim: int) -> Structure:
    """The block's neurons and heads. `run` runs the loaded block on probe tokens, at least 8 of them.

    head_dim: channels of a head; 0 when the model says no such number, and then no heads are looked for.
    """
    order = _order(block, run)
    neurons: Section | None = None
    heads: Section | None = None
    for position in reversed(range(1, len(order))):  # the MLP comes last in most blocks, and is what most need
        probe = _Probe(block, run, order[position])
        before = order[:position]
        if neurons is None:
            neurons = _neurons(probe, before)
            if neurons is not None:
                continue
        if heads is None and head_dim:
            heads = _heads(probe, before, head_dim)
    found = [section for section in (heads, neurons) if section is not None]
    adds = {section.consumer: _adds(block, run, section.consumer, found) for section in found}
    return Structure(
        neurons=neurons and replace(neurons, adds=adds[neurons.consumer]),
        heads=heads and replace(heads, adds=adds[heads.consumer]),
    )


def _adds(block: nn.Module, run: Callable[[], Tensor], consumer: str, sections: Sequence[Section]) -> bool:
    """Whether moving a consumer's output moves the block's by as much, while other sections give nothing."""
    moved: list[Tensor] = []

    def move(_: nn.Module, __: tuple[Tensor, ...], y: Tensor) -> Tensor:
        size = y.square().mean().sqrt()
        draw = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, y.dtype)
        moved.append(size * draw)
        return y + moved[-1]

    def nothing(_: nn.Module, __: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return torch.zeros_like(y)

    others = [block.get_submodule(s.consumer) for s in sections if s.consumer != consumer]
    handles = [other.register_forward_hook(nothing) for other in others]
    try:
        before = run()
        handles.append(block.get_submodule(consumer).register_forward_hook(move))
        change = run() - before
    finally:
        for handle in handles:
            handle.remove()
    if change.shape != moved[0].shape:
        return False
    wrong, right = (torch.linalg.vector_norm(t.double()) for t in (change - moved[0], moved[0]))
    return bool(wrong <= 1e-3 * right)


def _order(block: nn.Module, run: Callable[[], Tensor]) -> list[str]:
    """The block's linears in the order in which they ran."""
    order: dict[str, None] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda *_: order.setdefault(name)

    handles = [module.register_forward_hook(note(name)) for name, module in linears(block).items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


class _Probe:
    """Which channels of one linear's input change when another's outputs do."""

    def __init__(self, block: nn.Module, run: Callable[[], Tensor], consumer: str) -> None:
        self.block = block
        self.run = run
        self.consumer = consumer
        self.x_TI = self._input()
        self.energy_I = self.x_TI.square().sum(0)

    @property
    def size(self) -> int:
        return self.x_TI.shape[1]

    def rows(self, name: str) -> int:
        return weight_OI(self.block.get_submodule(name)).shape[0]

    def changed(self, name: str, rows: Tensor) -> Tensor:
        """Channels that change when `rows` (int64) of a linear's outputs are multiplied by factors; bool `[I]`."""
        draw = torch.rand(len(rows), generator=torch.Generator().manual_seed(len(rows)), dtype=torch.float64)
        factor_R = torch.ones(self.rows(name), dtype=torch.float64)
        factor_R[rows] = torch.where(draw < 0.5, 0.4 + draw, 1.1 + draw)  # 0.4 to 0.9 or 1.6 to 2.1

        def scale(_: nn.Module, __: tuple[Tensor, ...], y: Tensor) -> Tensor:
            return y * factor_R.to(y.device, y.dtype)

        handle = self.block.get_submodule(name).register_forward_hook(scale)
        try:
            x_TI = self._input()
        finally:
            handle.remove()
        change_I = (x_TI - self.x_TI).square().sum(0)
        return (change_I > _CHANGED * self.energy_I).cpu()

    def _input(self) -> Tensor:
        seen: list[Tensor] = []
        module = self.block.get_submodule(self.consumer)
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        try:
            self.run()
        finally:
            handle.remove()
        return seen[0].reshape(-1, seen[0].shape[-1]).double()


def _neurons(probe: _Probe, before: list[str]) -> Section | None:
    """Units of one channel: each row of a producer feeds one channel, and no channel is fed twice by a segment."""
    size = probe.size
    producers = []
    for name in before:
        rows = probe.rows(name)
        if rows % size:
            continue
        fed = int(probe.changed(name, torch.tensor([rows // 2])).sum())
        if fed > 1 and fed < size:
            return None  # rows that feed several channels, but not all: heads
        if fed != 1:
            continue
        parts = [_unit_of_row(probe, name, segment) for segment in torch.arange(rows).split(size)]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            return None
        producers.append(Producer(name=name, run_rows=1, feeds=torch.cat(found)))
    if not producers:
        return None
    return Section(consumer=probe.consumer, unit_size=1, group_U=torch.arange(size), producers=tuple(producers))


def _unit_of_row(probe: _Probe, name: str, segment: Tensor) -> Tensor | None:
    """The channel that each row of a segment (as many rows as channels) feeds, int64 `[S]`; None if not one each.

    Row r is told by the bits of r: once the rows with a bit set are scaled, and once those without it, and each channel
    must change in one of the two. Channels that are zero on the probe show nothing and are taken to have their own row.
    """
    size = len(segment)
    place = torch.arange(size)
    row_I = torch.zeros(size, dtype=torch.int64)
    alive = (probe.energy_I > 0).cpu()
    for bit in range(max(1, (size - 1).bit_length())):
        set_S = (place >> bit) & 1 == 1
        with_bit = probe.changed(name, segment[set_S])
        without = probe.changed(name, segment[~set_S])
        if not bool((with_bit ^ without)[alive].all()):
            return None
        row_I += with_bit.long() << bit
    row_I[~alive] = place[~alive]
    if not bool((row_I.sort().values == place).all()):
        return None
    return row_I.argsort()


def _heads(probe: _Probe, before: list[str], head_dim: int) -> Section | None:
    """Units of `head_dim` channels, each fed by a run of rows of its own; those that share other runs are a group."""
    size = probe.size
    num_units = size // head_dim
    if size % head_dim or num_units < 2:
        return None
    producers = []
    own_U = torch.zeros(num_units, dtype=torch.bool)
    for name in before:
        rows = probe.rows(name)
        if rows % head_dim or rows > 4 * size:
            continue
        runs = torch.arange(rows).split(head_dim)
        feeds = torch.stack([probe.changed(name, run).reshape(num_units, head_dim).any(1) for run in runs])
        if len(runs) > 1 and bool(feeds.all()):
            continue  # dense
        own_U |= feeds[feeds.sum(1) == 1].any(0)
        producers.append(Producer(name=name, run_rows=head_dim, feeds=feeds))
    if not bool(own_U.all()):
        return None
    group_U = _groups([producer.feeds for producer in producers], num_units)
    if len(torch.unique(torch.bincount(group_U))) != 1:
        return None
    return Section(consumer=probe.consumer, unit_size=head_dim, group_U=group_U, producers=tuple(producers))


def _groups(feeds: list[Tensor], num_units: int) -> Tensor:
    """Units joined by any run that feeds several of them; int64 `[U]`, numbered by first unit."""
    label = list(range(num_units))
    for run_U in torch.cat(feeds):
        units = run_U.nonzero().flatten().tolist()
        joined = {label[u] for u in units}
        label = [min(joined) if one in joined else one for one in label]
    group_U: Tensor = torch.unique(torch.tensor(label), return_inverse=True)[1]
    return group_U
