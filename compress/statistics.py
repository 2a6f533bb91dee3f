"""What a method may know about a linear's inputs: their Gram matrix and mean magnitude, never the inputs themselves.

A weight change D of a linear `[O, I]` with inputs X `[tokens, I]` changes its outputs by `X D^T`, whose squared norm is
`tr(D G D^T)` with `G = X^T X`. So scale search, clipping, range fitting and error feedback need G alone. G is a sum
over tokens: batches, processes and machines add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compress import distributed
from compress.groups import Group

_TILE = 512
# Wider where a launch costs more than a few products too many.
_GPU_TILE = 1024


@dataclass(kw_only=True)
class InputStatistics:
    """Sums over the calibration tokens that reached one group of linears; all float32.

    gram_II: sum of outer products, symmetric. magnitude_I: sum of |x|. num_tokens: how many rows were added.
    cross_II: sum of `(x' - x) x^T`, x' being what the original model has in x's place; None where the two are equal.
    closed: the sums of earlier parts of the calibration set, if it is added up in parts.
    """

    gram_II: Tensor
    magnitude_I: Tensor
    num_tokens: int = 0
    cross_II: Tensor | None = None
    closed: list[Tensor] | None = None

    @classmethod
    def empty(cls, in_features: int, device: torch.device) -> InputStatistics:
        return cls(
            gram_II=torch.zeros(in_features, in_features, dtype=torch.float32, device=device),
            magnitude_I=torch.zeros(in_features, dtype=torch.float32, device=device),
        )

    def add(self, x_TI: Tensor, original_TI: Tensor | None = None) -> None:
        """Add the tokens of a batch, and what the original model has in their place.

        Of the Gram matrix only tiles on and below the diagonal are multiplied; `finish` mirrors them. On a GPU, 16-bit
        inputs are multiplied as they are: the product of two of them is exact in float32, which is what the matrix
        unit sums them in.
        """
        half = x_TI.is_cuda and x_TI.dtype in (torch.bfloat16, torch.float16)
        x = x_TI if half else x_TI.to(torch.float32)
        size = _GPU_TILE if x.is_cuda else _TILE
        for start in range(0, x.shape[1], size):
            _add_product(self.gram_II[start:, start : start + size], x[:, start:], x[:, start : start + size])
        if original_TI is not None:
            if self.cross_II is None:
                self.cross_II = torch.zeros_like(self.gram_II)
            _add_product(self.cross_II, (original_TI.float() - x_TI.float()).to(x.dtype), x)
        self.magnitude_I += x.abs().sum(dim=0, dtype=torch.float32)
        self.num_tokens += x.shape[0]

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
        return [self.gram_II, self.magnitude_I, *([] if self.cross_II is None else [self.cross_II])]

    def finish(self) -> None:
        """Add up all parts, of all processes, take means over tokens, and make the Gram matrix exactly symmetric."""
        for total, one in zip(self.closed or [], self._sums(), strict=self.closed is not None):
            one.copy_(total.add_(one))
        self.closed = None
        for one in self._sums():
            distributed.add_up(one)
        self.num_tokens = distributed.add_up_count(self.num_tokens, self.gram_II.device)
        for start in range(0, self.gram_II.shape[0], _TILE):
            stop = start + _TILE
            self.gram_II[start:stop, stop:] = self.gram_II[stop:, start:stop].t()
            square = self.gram_II[start:stop, start:stop]
            square.copy_(square.tril() + square.tril(-1).t())
        self.gram_II /= max(1, self.num_tokens)
        self.magnitude_I /= max(1, self.num_tokens)
        if self.cross_II is not None:
            self.cross_II /= max(1, self.num_tokens)

    def smoothed(self, s_I: Tensor) -> Tensor:
        """The Gram matrix of the inputs once they are divided by s: `D^-1 G D^-1`, no second pass needed."""
        return (self.gram_II / s_I.unsqueeze(1)).div_(s_I)

    def smooth_(self, s_I: Tensor) -> None:
        """Become the statistics of the inputs divided by s; in place, since a wide layer's matrices are gigabytes."""
        for matrix_II in (self.gram_II, self.cross_II):
            if matrix_II is not None:
                matrix_II.div_(s_I.unsqueeze(1)).div_(s_I)
        self.magnitude_I.div_(s_I)


def _add_product(sum_II: Tensor, left_TI: Tensor, right_TI: Tensor) -> None:
    if left_TI.dtype == torch.float32:
        sum_II.addmm_(left_TI.t(), right_TI)
    else:
        sum_II += torch.mm(left_TI.t(), right_TI, out_dtype=torch.float32)


@dataclass(kw_only=True)
class Collector:
    """Takes each group's inputs from the forwards of a block: adds them up, or, while `keeping`, holds the last ones.

    Inputs that were kept are the original model's counterparts of those that are added next.
    """

    statistics: list[InputStatistics]
    keeping: bool = False
    kept: dict[int, Tensor] = field(default_factory=dict)

    def take(self, group: int, x_TI: Tensor) -> None:
        if self.keeping:
            self.kept[group] = x_TI
        else:
            self.statistics[group].add(x_TI, self.kept.pop(group, None))


@contextmanager
def collecting(block: nn.Module, groups: Sequence[Group], device: torch.device) -> Iterator[Collector]:
    """Collect each group's statistics from every forward of `block` inside the context."""
    collector = Collector(statistics=[InputStatistics.empty(g.in_features, device) for g in groups])

    def hook(group: int):  # type: ignore[no-untyped-def]
        def take(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            if torch.is_autocast_enabled(device.type):  # what the linear is about to compute with
                x = x.to(torch.get_autocast_dtype(device.type))
            collector.take(group, x.reshape(-1, x.shape[-1]))

        return take

    handles = [
        block.get_submodule(group.layers[0]).register_forward_pre_hook(hook(i)) for i, group in enumerate(groups)
    ]
    try:
        yield collector
    finally:
        for handle in handles:
            handle.remove()
    for statistics in collector.statistics:
        statistics.finish()
