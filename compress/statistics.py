"""What a method may know about a linear's inputs: sums, ranges and a small sample of them, never all.

A weight change D of a linear `[O, I]` with inputs X `[tokens, I]` changes its outputs by `X D^T`, whose squared norm is
`tr(D G D^T)` with `G = X^T X`. So scale search, clipping, range fitting and error feedback need G alone. G is a sum
over tokens: batches, processes and machines add up. What inputs become as integers cannot be told from sums: for that a
method asks for the range of each channel and for some tokens themselves (`Wanted`).

Shapes: T tokens, S sampled tokens, I in_features, O out_features
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compress import distributed
from compress.groups import Group
from compress.linear import weight_OI

# Columns of the Gram matrix that one product gives: the fewer, the less is multiplied twice, the slower each product.
_TILE = 192
_GPU_TILE = 1024
_MIRROR_TILE = 512
# How much of a Gram matrix's off-diagonal part is not believed, at least.
SHRINKAGE = 0.05


def kept_share(num_columns: int, num_tokens: int) -> float:
    """What to take the off-diagonal part of a Gram matrix times: less, the fewer tokens it was measured on.

    The correlations of a few thousand tokens are partly chance, and corrections that trust them overfit. The share of
    the off-diagonal part that is chance grows as I / num_tokens (the sampling variance of a covariance matrix over its
    size, as in Ledoit and Wolf's shrinkage), so that much is taken off, and never less than `SHRINKAGE`.
    """
    return 1 - min(1.0, max(SHRINKAGE, num_columns / max(1, num_tokens)))


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a method asks for. gram: Gram matrix, magnitudes, and with two paths what tells these from each other;
    ranges: least and greatest value of each channel; rows: how many of the tokens to keep as they are; sources: the
    original model's hidden states before the block (no statistics, but asked for alike)."""

    gram: bool = True
    ranges: bool = False
    rows: int = 0
    sources: bool = False

    @property
    def statistics(self) -> bool:
        """Whether anything of a linear's inputs is wanted."""
        return self.gram or self.ranges or bool(self.rows)

    def positions(self, num_tokens: int) -> Tensor:
        """Which tokens of `num_tokens` are kept: int64, sorted; the same for every batch size and process."""
        drawn = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(3307))
        return drawn[: self.rows].sort().values


@dataclass(kw_only=True)
class InputStatistics:
    """What is known of the calibration tokens that reached one group of linears; all float32.

    gram_II: sum of outer products, symmetric. magnitude_I: sum of |x|. num_tokens: how many rows were added.
    cross: what tells the original model's inputs x' from these, None where the two are equal: the sum of
    `(x' - x) x^T`, `[I, I]`, or with `by_output` that of `(W x' - W x) x^T`, `[O, I]`, which is smaller and cheaper for
    a linear W that is alone in its group and has fewer outputs than inputs.
    low_I, high_I: least and greatest value of each channel; rows_SI: the sampled tokens, in their order. None unless
    `Wanted`; without a wanted Gram matrix, `gram_II` is empty.
    closed: the sums of earlier parts of the calibration set, if it is added up in parts.
    """

    gram_II: Tensor
    magnitude_I: Tensor
    num_tokens: int = 0
    cross: Tensor | None = None
    by_output: bool = False
    low_I: Tensor | None = None
    high_I: Tensor | None = None
    rows_SI: Tensor | None = None
    closed: list[Tensor] | None = None

    @classmethod
    def empty(
        cls, in_features: int, device: torch.device, *, by_output: bool = False, wanted: Wanted | None = None
    ) -> InputStatistics:
        wanted = wanted or Wanted()
        size = in_features if wanted.gram else 0
        magnitude_I = torch.zeros(in_features, dtype=torch.float32, device=device)
        return cls(
            gram_II=torch.zeros(size, size, dtype=torch.float32, device=device),
            magnitude_I=magnitude_I,
            by_output=by_output,
            low_I=torch.full_like(magnitude_I, torch.inf) if wanted.ranges else None,
            high_I=torch.full_like(magnitude_I, -torch.inf) if wanted.ranges else None,
            rows_SI=magnitude_I.new_empty(0, in_features) if wanted.rows else None,
        )

    @property
    def amax_I(self) -> Tensor:
        """Largest |x| of each channel; the ranges must be wanted."""
        assert self.low_I is not None and self.high_I is not None
        return torch.maximum(-self.low_I, self.high_I)

    def add(self, x_TI: Tensor, shift_TX: Tensor | None = None) -> None:
        """Add the tokens of a batch, and how far from them the original model's are: `x' - x`, or `W x' - W x`.

        Of the Gram matrix only tiles on and below the diagonal are multiplied; `finish` mirrors them. On a GPU, 16-bit
        inputs are multiplied as they are: the product of two of them is exact in float32, which is what the matrix
        unit sums them in.
        """
        half = x_TI.is_cuda and x_TI.dtype in (torch.bfloat16, torch.float16)
        x = x_TI if half else x_TI.to(torch.float32)
        size = _GPU_TILE if x.is_cuda else _TILE
        for start in range(0, self.gram_II.shape[0], size):
            _add_product(self.gram_II[start:, start : start + size], x[:, start:], x[:, start : start + size])
        if shift_TX is not None and len(self.gram_II):
            if self.cross is None:
                self.cross = torch.zeros(shift_TX.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
            _add_product(self.cross, shift_TX.to(x.dtype), x)
        self.magnitude_I += x.abs().sum(dim=0, dtype=torch.float32)
        self.num_tokens += x.shape[0]
        if self.low_I is not None and self.high_I is not None:
            self.low_I = torch.minimum(self.low_I, x.amin(dim=0).float())
            self.high_I = torch.maximum(self.high_I, x.amax(dim=0).float())

    def keep_rows(self, rows_SI: Tensor) -> None:
        """Add sampled tokens to those that are kept."""
        assert self.rows_SI is not None
        self.rows_SI = torch.cat([self.rows_SI, rows_SI.float()])

    def close_part(self) -> None:
        """End a part of the calibration set: what follows is summed on its own before it is added."""
        sums = self._sums()
        if self.closed is None:
            self.closed = [one.clone() for one in sums]
        else:
            for total, one in zip(self.closed, sums, strict=True):
                total += one
        for one in sums:
            one.zero_()

    def _sums(self) -> list[Tensor]:
        return [self.gram_II, self.magnitude_I, *([] if self.cross is None else [self.cross])]

    def finish(self) -> None:
        """Add up all parts, of all processes, take means over tokens, and make the Gram matrix exactly symmetric."""
        for total, one in zip(self.closed or [], self._sums(), strict=self.closed is not None):
            one.copy_(total.add_(one))
        self.closed = None
        for one in self._sums():
            distributed.add_up(one)
        self.num_tokens = distributed.add_up_count(self.num_tokens, self.gram_II.device)
        if self.low_I is not None and self.high_I is not None:
            self.low_I = -distributed.largest(-self.low_I)
            self.high_I = distributed.largest(self.high_I)
        if self.rows_SI is not None:
            self.rows_SI = distributed.joined_rows(self.rows_SI)
        for start in range(0, self.gram_II.shape[0], _MIRROR_TILE):
            stop = start + _MIRROR_TILE
            self.gram_II[start:stop, stop:] = self.gram_II[stop:, start:stop].t()
            square = self.gram_II[start:stop, start:stop]
            square.copy_(square.tril() + square.tril(-1).t())
        self.gram_II /= max(1, self.num_tokens)
        self.magnitude_I /= max(1, self.num_tokens)
        if self.cross is not None:
            self.cross /= max(1, self.num_tokens)

    def smooth_(self, s_I: Tensor) -> None:
        """Become the statistics of the inputs divided by s > 0, `D^-1 G D^-1`; in place, as they can be gigabytes."""
        if len(self.gram_II):
            self.gram_II.div_(s_I.unsqueeze(1)).div_(s_I)
        for values in (self.low_I, self.high_I, self.rows_SI):
            if values is not None:
                values.div_(s_I)
        if self.cross is not None:
            self.cross.div_(s_I)
            if not self.by_output:
                self.cross.div_(s_I.unsqueeze(1))
        self.magnitude_I.div_(s_I)

    def clear(self) -> None:
        """Give the matrices back; nothing can be asked of these statistics any more."""
        self.gram_II = self.gram_II.new_empty(0, 0)
        self.cross = self.rows_SI = None

    def target_shift(self, w_OI: Tensor, row_scale_O: Tensor | None = None) -> Tensor | None:
        """`W C`: mean of `(W x' - W x) x^T`, float32 `[O, I]`; None where the two paths are equal.

        w_OI: the group's linears, stacked. row_scale_O: what the rows of W were divided by after these statistics were
        collected.
        """
        if self.cross is None or not self.by_output:
            return None if self.cross is None else w_OI @ self.cross
        return self.cross if row_scale_O is None else self.cross / row_scale_O.unsqueeze(1)


def _add_product(sum_II: Tensor, left_TI: Tensor, right_TI: Tensor) -> None:
    if left_TI.dtype == torch.float32:
        sum_II.addmm_(left_TI.t(), right_TI)
    else:
        sum_II += torch.mm(left_TI.t(), right_TI, out_dtype=torch.float32)


@dataclass(kw_only=True)
class Collector:
    """Takes each group's inputs from the forwards of a block: adds them up, or, while `keeping`, holds the last ones.

    What was kept are the original model's counterparts of what is added next. positions: the sampled tokens, counted in
    this process's own.
    """

    statistics: list[InputStatistics]
    positions: Tensor
    keeping: bool = False
    kept: dict[int, Tensor] = field(default_factory=dict)

    def take(self, group: int, x_TI: Tensor, y_TO: Tensor) -> None:
        """x_TI: the inputs of the group's linears; y_TO: the output of the first of them."""
        statistics = self.statistics[group]
        told = y_TO if statistics.by_output else x_TI
        if self.keeping:
            self.kept[group] = told
        else:
            before = self.kept.pop(group, None)
            start = statistics.num_tokens
            statistics.add(x_TI, None if before is None else before.float() - told.float())
            if statistics.rows_SI is not None:
                inside = (self.positions >= start) & (self.positions < start + len(x_TI))
                statistics.keep_rows(x_TI[(self.positions[inside] - start).to(x_TI.device)])


@contextmanager
def collecting(
    block: nn.Module,
    groups: Sequence[Group],
    device: torch.device,
    wanted: Wanted | None = None,
    positions: Tensor | None = None,
) -> Iterator[Collector]:
    """Collect each group's statistics from every forward of `block` inside the context.

    positions: which tokens are sampled, counted in those that this process runs; sorted.
    """
    wanted = wanted or Wanted()

    def narrows(group: Group) -> bool:
        rows = weight_OI(block.get_submodule(group.layers[0])).shape[0]
        return len(group.layers) == 1 and rows < group.in_features

    collector = Collector(
        statistics=[InputStatistics.empty(g.in_features, device, by_output=narrows(g), wanted=wanted) for g in groups],
        positions=torch.empty(0, dtype=torch.int64) if positions is None else positions,
    )

    def hook(group: int):  # type: ignore[no-untyped-def]
        def take(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            x = args[0].detach()
            if torch.is_autocast_enabled(device.type):  # what the linear has just computed with
                x = x.to(torch.get_autocast_dtype(device.type))
            collector.take(group, x.reshape(-1, x.shape[-1]), y.detach().reshape(-1, y.shape[-1]))

        return take

    handles = [block.get_submodule(group.layers[0]).register_forward_hook(hook(i)) for i, group in enumerate(groups)]
    try:
        yield collector
    finally:
        for handle in handles:
            handle.remove()
    for statistics in collector.statistics:
        statistics.finish()
