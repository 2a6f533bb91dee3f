"""How one loaded block is pruned: units chosen on their inputs as they now are, and what reads them refitted.

The hidden states that enter differ from the original's once a block before is gone or pruned. In the order in which
the block computes:

    readers           linears that read the hidden state are refitted on it as it is now, towards what they had computed
    heads             chosen, the output projection refitted and aimed at the original's hidden state behind it
    neurons           chosen, the last linear refitted and aimed at where the original is when the next block begins

so the last linear also takes over, as far as it can see it, the work of blocks that were removed behind it. The block's
own weights are never changed: the pruned ones are run in their place, by name.

Shapes: B batch, T tokens, H hidden size, O out_features, I in_features, U units
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.block import BlockResult, LoadedBlock
from compress.blocks import with_attributes
from compress.errors import ArtifactError
from compress.linear import is_conv1d, linears, weight_OI
from compress.prune.cut import Cut, cut_axis, row_axis
from compress.prune.importance import kept_neurons, kept_pieces, without
from compress.prune.kinds import parts_of
from compress.prune.repair import DAMPING, HIDDEN_DAMPING, factor, hessian, lost_by_cutting, refit
from compress.prune.structure import Section
from compress.statistics import InputStatistics

DECILES = 10


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """repair: refit what reads the units that stay; without it they are cut out and nothing else changes. strength:
    see `repair.refit`. fitted: numbers of the rows that are fitted on, None for all; the others are held out."""

    repair: bool = True
    strength: float = 0.5
    fitted: Sequence[range] | None = None


def prune_block(
    loaded: LoadedBlock, cut: Cut, options: PruneOptions, dtype: Callable[[str], torch.dtype]
) -> BlockResult:
    """The block as it is in the pruned model; its tensors in the dtypes that `dtype(name)` gives.

    Needs two paths with their sources, and no statistics.
    """
    work = _Work(loaded, cut, options)
    report: dict[str, Any] = {"block": loaded.index, "sections": []}
    for group in loaded.groups:
        section = work.section_of(group.layers)
        if section is not None:
            found = work.section(section)
            report["sections"] += [found] if found else []
        elif options.repair and (cut.channels is not None or work.wrong_before or work.touched):
            work.readers(group.layers)
    return BlockResult(quantized={}, dense=work.stored(dtype), report=report)


class _Work:
    """A block on its way: its weights as they are by now, by name, and how the original and the pruned one run."""

    def __init__(self, loaded: LoadedBlock, cut: Cut, options: PruneOptions) -> None:
        self.loaded, self.cut, self.options = loaded, cut, options
        self.module = loaded.module
        self.weights = {name: value.detach() for name, value in self.module.state_dict().items()}
        self.layers = linears(self.module)
        rows = [range(sum(len(h) for h in loaded.inputs))] if options.fitted is None else options.fitted
        self.pieces = [piece for some in rows for piece in parts_of(loaded.inputs, some)]
        self.attributes: Mapping[str, Mapping[str, Any]] = {}
        # Whether what enters, what this block makes of it, or what is behind it differs from the original.
        self.wrong_before = any(a is not b for a, b in zip(loaded.inputs, loaded.sources, strict=True))
        self.touched = cut.channels is not None
        self.damping = DAMPING if cut.channels is None else HIDDEN_DAMPING
        self.gone_behind = loaded.index + 1 not in (*cut.kept, cut.old.blocks)
        if cut.channels is not None:
            for name, value in self.weights.items():
                for axis in cut.hidden_axes.get(name, ()):
                    self.weights[name] = value = cut_axis(value, axis, cut.channels)

    def section_of(self, layers: Sequence[str]) -> Section | None:
        """The section whose units a group of linears reads."""
        structure = self.cut.structure
        sections = (structure.heads, structure.neurons) if structure else ()
        return next((s for s in sections if s is not None and layers == (s.consumer,)), None)

    # ---- running -------------------------------------------------------------------------------------

    def tap(self, layer: str, hidden: Tensor, *, original: bool = False, to_end: bool = False) -> _Tap:
        """What a linear reads and returns, with the weights as they are by now or the `original` ones.

        The block stops there unless it runs `to_end`, and then `out` is what leaves it.
        """
        tap = _Tap()

        def note(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            x = args[0].detach()
            if torch.is_autocast_enabled(x.device.type):  # what the linear has just computed with
                x = x.to(torch.get_autocast_dtype(x.device.type))
            tap.x, tap.y = x, y.detach()
            if not to_end:
                raise _EnoughError

        handle = self.layers[layer].register_forward_hook(note)
        try:
            with with_attributes(self.module, {} if original else self.attributes), suppress(_EnoughError):
                tap.out = self.loaded.forward(hidden, {} if original else self.weights)
        finally:
            handle.remove()
        return tap

    def on_channels(self, hidden: Tensor) -> Tensor:
        """The hidden channels that stay."""
        channels = self.cut.channels
        return hidden if channels is None else cut_axis(hidden, -1, channels)

    # ---- heads and neurons ---------------------------------------------------------------------------

    def section(self, section: Section) -> dict[str, Any] | None:
        """Choose the units of a section, if some go, and refit what reads them; what was done, or None."""
        is_heads = section.unit_size > 1
        goes = (self.cut.heads if is_heads else self.cut.neurons) is not None
        keep = self.cut.shape.heads if is_heads else self.cut.shape.intermediate
        astray = self.wrong_before or self.touched or (self.gone_behind and not is_heads)
        if not goes and not (astray and self.options.repair):
            return None
        statistics = self._evidence(section, is_heads, aim=astray and self.options.repair)
        hessian_II, share = hessian(statistics, self.damping)
        moved_OI = None if statistics.cross is None else share * statistics.cross
        statistics.clear()
        w_OI = self._weight(section.consumer)
        units, costs = self._choose(section, keep, w_OI, hessian_II) if goes else (None, [])
        kept = None if units is None else section.channels(units)
        if self.options.repair:
            new_OK, lost = refit(w_OI, hessian_II, kept, moved_OI, self.options.strength)
        else:
            assert kept is not None
            new_OK, lost = w_OI[:, kept.to(w_OI.device)], lost_by_cutting(w_OI, hessian_II, kept)
        found = {"layer": section.consumer, "lost": lost}
        self._set_weight(section.consumer, new_OK)
        self.touched = True
        if units is not None:
            self._drop_rows(section, units)
            found.update(_choice(section, units, costs))
            if is_heads:
                self.attributes = self.cut.attributes
        return found

    def _evidence(self, section: Section, is_heads: bool, *, aim: bool) -> InputStatistics:
        """Sums of what a consumer reads now, and, with `aim`, of how its outputs should move with it.

        Each token counts by the size of the hidden state that it is added to: what a norm makes of it is what counts.
        """
        size = self._weight(section.consumer).shape
        statistics = InputStatistics.empty(size[1], self.weights[f"{section.consumer}.weight"].device, by_output=True)
        loaded = self.loaded
        for i, rows in self.pieces:
            entering, source, target = (of[i][rows] for of in (loaded.inputs, loaded.sources, loaded.targets))
            ends = section.adds and not is_heads
            meant = self.tap(section.consumer, source, original=True).y if aim and not ends else None
            tap = self.tap(section.consumer, entering, to_end=ends)
            x, y = tap.x, tap.y
            if ends:
                reference = wanted = self.on_channels(target)
                now = tap.out
            elif section.adds:
                now = entering + y
                reference = wanted = now if meant is None else self.on_channels(source + meant)
            else:
                now = y
                reference = wanted = now if meant is None else self.on_channels(meant)
            each = reference.flatten(0, -2).float().square().mean(-1, keepdim=True).clamp(min=1e-20).rsqrt()
            shift = (wanted.float() - now.float()).flatten(0, -2) * each if aim else None
            flat = x.flatten(0, -2)
            statistics.add((flat.float() * each).to(flat.dtype), shift)
        statistics.finish()
        return statistics

    def _choose(self, section: Section, keep: int, w_OI: Tensor, hessian_II: Tensor) -> tuple[Tensor, list[float]]:
        """Units that stay, ascending (int64), and what each would have cost alone, as a share of all output."""
        if not self.options.repair:
            alone_U = (w_OI.square().sum(0) * hessian_II.diagonal()).reshape(-1, section.unit_size).sum(1).cpu()
            return _best(section, keep, alone_U, self.cut), (alone_U / alone_U.sum()).tolist()
        inverse_II = torch.cholesky_inverse(factor(hessian_II))
        total = float(((w_OI @ hessian_II) * w_OI).sum())
        if section.unit_size == 1:
            units, alone_I = kept_neurons(w_OI, inverse_II, keep)
            return units, (alone_I / total).tolist()
        units, alone = kept_heads(section, keep, self.cut, w_OI, inverse_II)
        return units, [cost / total for cost in alone]

    def _drop_rows(self, section: Section, units: Tensor) -> None:
        for name, rows in section.kept_rows(units).items():
            axis = row_axis(self.layers[name])
            self.weights[f"{name}.weight"] = cut_axis(self.weights[f"{name}.weight"], axis, rows)
            if f"{name}.bias" in self.weights:
                self.weights[f"{name}.bias"] = cut_axis(self.weights[f"{name}.bias"], 0, rows)

    def _weight(self, name: str) -> Tensor:
        w_OI: Tensor = self.weights[f"{name}.weight"].float()
        return w_OI.t() if is_conv1d(self.layers[name]) else w_OI

    def _set_weight(self, name: str, w_OI: Tensor) -> None:
        self.weights[f"{name}.weight"] = (w_OI.t() if is_conv1d(self.layers[name]) else w_OI).contiguous()

    # ---- what reads the hidden state -----------------------------------------------------------------

    def readers(self, names: Sequence[str]) -> None:
        """Refit linears that read the hidden state as it is now, on its channels that stay, towards what they gave."""
        weights = [weight_OI(self.layers[name]).float() for name in names]
        channels = self.cut.channels
        kept = slice(None) if channels is None else channels.to(weights[0].device)
        size = self._weight(names[0]).shape[1]
        statistics = InputStatistics.empty(size, weights[0].device)
        for i, rows in self.pieces:
            before = self.tap(names[0], self.loaded.sources[i][rows], original=True).x
            x = self.tap(names[0], self.loaded.inputs[i][rows]).x.flatten(0, -2)
            shift = before.flatten(0, -2).to(torch.float32, copy=True)  # it may be the hidden state itself
            shift[:, kept] -= x.float()
            statistics.add(x, shift)
        statistics.finish()
        hessian_II, share = hessian(statistics, self.damping)
        assert statistics.cross is not None
        moved_OI = torch.cat(weights) @ (share * statistics.cross)
        stacked = torch.cat([self._weight(name) for name in names])
        new_OI, _ = refit(stacked, hessian_II, None, moved_OI, strength=1.0)
        for name, part_OI in zip(names, new_OI.split([len(w) for w in weights]), strict=True):
            self._set_weight(name, part_OI)
        self.touched = True

    # ---- the end -------------------------------------------------------------------------------------

    def stored(self, dtype: Callable[[str], torch.dtype]) -> dict[str, Tensor]:
        """Every tensor of the block as it is written. ArtifactError for one that its dtype cannot hold."""
        out = {}
        for name, value in self.weights.items():
            out[name] = value.to(dtype(name)) if value.is_floating_point() else value
            if value.is_floating_point() and not bool(torch.isfinite(out[name]).all()):
                raise ArtifactError(
                    f"{self.loaded.prefix}{name}: refitted values exceed {dtype(name)}; pass --no-repair, or "
                    "a model stored in bfloat16"
                )
        return out


@dataclass
class _Tap:
    """What a linear read, as it computed with it, what it returned, and what left the block if it ran to its end."""

    x: Tensor = field(default_factory=lambda: torch.empty(0))
    y: Tensor = field(default_factory=lambda: torch.empty(0))
    out: Tensor = field(default_factory=lambda: torch.empty(0))


class _EnoughError(Exception):
    """What was wanted of a block has been computed."""


def kept_heads(section: Section, keep: int, cut: Cut, w_OI: Tensor, inverse_II: Tensor) -> tuple[Tensor, list[float]]:
    """Heads that stay: first whole groups go, then as many from each group that is left; and each head's cost alone."""
    group_U = section.group_U
    channels = [section.channels(torch.tensor([u])) for u in range(section.num_units)]
    _, alone = kept_pieces(w_OI, inverse_II, channels, section.num_units)
    groups = list(range(section.num_groups))
    if cut.shape.kv_heads < cut.old.kv_heads:
        whole = [section.channels((group_U == g).nonzero().flatten()) for g in groups]
        groups, _ = kept_pieces(w_OI, inverse_II, whole, cut.shape.kv_heads)
    left = [u for u in range(section.num_units) if int(group_U[u]) in groups]
    gone = torch.ones(w_OI.shape[1], dtype=torch.bool, device=w_OI.device)
    gone[torch.cat([channels[u] for u in left]).to(gone.device)] = False
    w, inverse = without(w_OI, inverse_II, gone) if bool(gone.any()) else (w_OI, inverse_II)
    pieces = list(torch.arange(w.shape[1]).split(section.unit_size))
    places, _ = kept_pieces(w, inverse, pieces, keep, [int(group_U[u]) for u in left])
    return torch.tensor([left[place] for place in places]), alone


def _best(section: Section, keep: int, score_U: Tensor, cut: Cut) -> Tensor:
    """Units of the highest scores, under the same rules for groups."""
    if section.unit_size == 1:
        return torch.sort(score_U, descending=True, stable=True).indices[:keep].sort().values
    group_U = section.group_U
    of_group = torch.zeros(section.num_groups).index_add_(0, group_U, score_U)
    groups = torch.sort(of_group, descending=True, stable=True).indices[: cut.shape.kv_heads].tolist()
    groups = groups if cut.shape.kv_heads < cut.old.kv_heads else list(range(section.num_groups))
    units = []
    for g in sorted(groups):
        members = (group_U == g).nonzero().flatten()
        order = torch.sort(score_U[members], descending=True, stable=True).indices[: keep // len(groups)]
        units.append(members[order])
    return torch.cat(units).sort().values


def _choice(section: Section, units: Tensor, costs: Sequence[float]) -> dict[str, Any]:
    """What the manifest says of units: which stay, and what they cost alone (heads each, neurons by decile)."""
    if section.unit_size > 1:
        return {"units": section.num_units, "kept": units.tolist(), "cost": list(costs)}
    mask = sum(1 << int(u) for u in units)
    ordered = torch.tensor(costs, dtype=torch.float64).sort().values
    deciles = [float(part.sum()) for part in ordered.tensor_split(DECILES)]
    return {"units": section.num_units, "kept_mask": f"{mask:x}", "cost_by_decile": deciles}
