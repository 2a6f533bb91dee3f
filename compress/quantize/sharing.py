"""Which process searches and rounds what of a block, and what they send each other.

Each layer is computed by one process as one alone would compute it, so the bytes do not depend on how many there are.
Alone, a process has everything to do and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress import distributed
from compress.block import LoadedBlock
from compress.linear import linears, weight_OI
from compress.quantize.feedback import Rounded
from compress.quantize.stacks import stacks
from compress.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class Run:
    """Layers of one group of linears that are rounded together, and the process that does."""

    group: int
    names: list[str]
    owner: int

    @property
    def is_mine(self) -> bool:
        return self.owner == distributed.rank()


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Squared output errors of a layer against one target, the weight that was rounded: ours, and to nearest."""

    rounded: float
    to_nearest: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Scaled:
    """What a search found for a group; see `awq.ScaleChoice`. preferred: to no scale, by what confirms it."""

    s_I: Tensor
    ratio: float
    duo: bool
    preferred: bool

    @property
    def is_identity(self) -> bool:
        return self.ratio == 0 and not self.duo


def runs_of(loaded: LoadedBlock, chosen: Sequence[str]) -> list[Run]:
    """The layers in the order of their groups, shared out by the number of products that rounding them takes."""
    layers = linears(loaded.module)
    found = [
        (i, names)
        for i, group in enumerate(loaded.groups)
        for names in stacks({name: weight_OI(layers[name]).numel() for name in group.layers if name in chosen})
    ]
    costs = [sum(weight_OI(layers[n]).numel() for n in names) * loaded.groups[i].in_features for i, names in found]
    owners = distributed.owners(costs, distributed.num_processes())
    return [Run(group=i, names=names, owner=owner) for (i, names), owner in zip(found, owners, strict=True)]


def sent(found: Scaled | None, like_I: Tensor, owner: int) -> Scaled:
    """A group's scale from process `owner`, which found it. like_I: a tensor of the scale's size, dtype and device."""
    held = found or Scaled(s_I=torch.empty_like(like_I), ratio=0.0, duo=False, preferred=False)
    numbers = torch.tensor([held.ratio, held.duo, held.preferred], dtype=torch.float64, device=like_I.device)
    s_I = distributed.from_one(held.s_I, owner)
    ratio, duo, preferred = distributed.from_one(numbers, owner).tolist()
    return Scaled(s_I=s_I, ratio=ratio, duo=bool(duo), preferred=bool(preferred))


def exchanged(
    runs: Sequence[Run],
    layers: Mapping[str, nn.Module],
    schemes: Mapping[str, Scheme],
    rounded: Mapping[str, Rounded],
    errors: Mapping[str, Errors],
    signals: Mapping[str, float],
) -> tuple[dict[str, Rounded], dict[str, Errors], dict[str, float]]:
    """Codes, errors and signals of all runs, in their order, in every process; each comes from the run's owner."""
    all_rounded, all_errors, all_signals = dict(rounded), dict(errors), dict(signals)
    if not distributed.running():
        return all_rounded, all_errors, all_signals
    for run in runs:
        for name in run.names:
            w_OI = weight_OI(layers[name])
            held = rounded[name] if run.is_mine else _blank(w_OI, schemes[name])
            assert held.wanted_OI is None, "tuning is done in one process"
            parts = (held.codes_OI, held.scale_OG, held.zero_point_OG, held.factor_OG)
            codes_OI, scale_OG, zero_OG, factor_OG = (distributed.from_one(part, run.owner) for part in parts)
            all_rounded[name] = Rounded(
                codes_OI=codes_OI, scale_OG=scale_OG, zero_point_OG=zero_OG, factor_OG=factor_OG, wanted_OI=None
            )
            lost = errors.get(name, Errors(rounded=0.0, to_nearest=0.0))
            sums = torch.tensor([lost.rounded, lost.to_nearest, signals.get(name, 0.0)], dtype=torch.float64)
            ours, nearest, signal = distributed.from_one(sums.to(w_OI.device), run.owner).tolist()
            all_errors[name], all_signals[name] = Errors(rounded=ours, to_nearest=nearest), signal
    return all_rounded, all_errors, all_signals


def _blank(w_OI: Tensor, scheme: Scheme) -> Rounded:
    """Room for what another process has rounded."""
    scale_OG, zero_OG, factor_OG = (
        torch.empty(len(w_OI), scheme.groups(w_OI.shape[1]), device=w_OI.device) for _ in range(3)
    )
    codes_OI = torch.empty(w_OI.shape, dtype=torch.uint8, device=w_OI.device)
    return Rounded(codes_OI=codes_OI, scale_OG=scale_OG, zero_point_OG=zero_OG, factor_OG=factor_OG, wanted_OI=None)
