"""The optimizer and its rate: AdamW, a linear warm-up, then a cosine down to a share of the peak."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

BETAS = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class Rate:
    """peak: learning rate. warmup: share of the steps. floor: last rate as a share of the peak."""

    peak: float
    warmup: float = 0.05
    floor: float = 0.1

    def at(self, step: int, total: int) -> float:
        """The rate of update `step` (from 0) of `total`: the first is not zero, the last is nearly `floor * peak`."""
        rising = max(1, round(self.warmup * total))
        if step < rising:
            return self.peak * (step + 1) / rising
        done = (step - rising) / max(1, total - rising)
        return self.peak * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done)))


def adamw(
    named: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    share: Callable[[str], float] = lambda name: 1.0,
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW over the parameters that need a gradient; matrices decay, vectors (norms, biases) do not.

    share: of the run's rate that a parameter takes, by its name; see `set_rate`. eps: far below the gradients' size.
    Fused on a GPU.
    """
    trained = [(name, p) for name, p in named if p.requires_grad]
    by_kind: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, p in trained:
        by_kind.setdefault((p.ndim >= 2, share(name)), []).append(p)
    groups: list[dict[str, Any]] = [
        {"params": found, "weight_decay": weight_decay if matrix else 0.0, "scale": scale}
        for (matrix, scale), found in by_kind.items()
    ]
    fused = all(p.is_cuda for _, p in trained)
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=eps, fused=fused or None)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next update, times each group's own `scale`, if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)
