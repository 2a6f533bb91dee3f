"""What a block of logits adds to the running sums of a loss, and its part of the gradient: pure functions.

They touch no matrix product, so that `torch.compile` fuses each into one pass over the block.

Shapes: z student logits and t teacher logits of a block `[p, v]`; everything else is one number a token `[p]`
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.losses.heads import wide


@dataclass(frozen=True, eq=False)
class Running:
    """Of each token: the greatest logit so far, `sum exp(z - top)`, and that sum weighted with something."""

    top: Tensor
    total: Tensor
    weighted: Tensor

    @classmethod
    def start(cls, hidden_pH: Tensor) -> Running:
        zero = torch.zeros(len(hidden_pH), dtype=wide(hidden_pH.dtype), device=hidden_pH.device)
        return cls(torch.full_like(zero, -torch.inf), zero, zero)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.top, self.total, self.weighted))

    def lse(self) -> Tensor:
        return self.top + self.total.log()


Triple = tuple[Tensor, Tensor, Tensor]


def lse_step(top: Tensor, total: Tensor, weighted: Tensor, z: Tensor) -> Triple:
    higher = torch.maximum(top, z.amax(-1))
    return higher, total * (top - higher).exp() + (z - higher[:, None]).exp().sum(-1), weighted


def _weighted_step(top: Tensor, total: Tensor, weighted: Tensor, z: Tensor, value: Tensor) -> Triple:
    higher = torch.maximum(top, z.amax(-1))
    shrink = (top - higher).exp()
    e = (z - higher[:, None]).exp()
    return higher, total * shrink + e.sum(-1), weighted * shrink + (e * value).sum(-1)


def _forward_kl_step(student: Triple, other: Triple, z: Tensor, t: Tensor, temperature: float) -> tuple[Triple, Triple]:
    z, t = z / temperature, t / temperature
    return lse_step(*student, z), _weighted_step(*other, t, t - z)


def _reverse_kl_step(student: Triple, other: Triple, z: Tensor, t: Tensor, temperature: float) -> tuple[Triple, Triple]:
    z, t = z / temperature, t / temperature
    return _weighted_step(*student, z, z - t), lse_step(*other, t)


def _both_lse_step(student: Triple, other: Triple, z: Tensor, t: Tensor, temperature: float) -> tuple[Triple, Triple]:
    return lse_step(*student, z / temperature), lse_step(*other, t / temperature)


def sparse_step(
    top: Tensor, total: Tensor, weighted: Tensor, z: Tensor, index: Tensor, mass: Tensor, temperature: float
) -> Triple:
    z = z / temperature
    top, total, weighted = lse_step(top, total, weighted, z)
    return top, total, weighted + (z.gather(1, index) * mass).sum(-1)


def jsd_step(
    z: Tensor, t: Tensor, student: Tensor, other: Tensor, beta: float, temperature: float
) -> tuple[Tensor, Tensor]:
    log_q, log_p, log_m = _logs(z, t, student, other, beta, temperature)
    return (log_p.exp() * (log_p - log_m)).sum(-1), (log_q.exp() * (log_q - log_m)).sum(-1)


def _logs(z: Tensor, t: Tensor, student: Tensor, other: Tensor, beta: float, temperature: float) -> Triple:
    log_q, log_p = z / temperature - student[:, None], t / temperature - other[:, None]
    q, p = log_q.exp(), log_p.exp()
    # of tokens that both models all but exclude, the mixture underflows; they add nothing
    log_m = (beta * p + (1 - beta) * q).clamp(min=torch.finfo(z.dtype).tiny).log()
    return log_q, log_p, log_m


def probability(z: Tensor, lse: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return (z / temperature - lse[:, None]).exp() * weight[:, None]


def _forward_kl_gradient(
    z: Tensor, t: Tensor, student: Tensor, other: Tensor, value: Tensor, grad: Tensor, temperature: float, beta: float
) -> Tensor:
    q = (z / temperature - student[:, None]).exp()
    return (q - (t / temperature - other[:, None]).exp()) * (grad * temperature)[:, None]


def _reverse_kl_gradient(
    z: Tensor, t: Tensor, student: Tensor, other: Tensor, value: Tensor, grad: Tensor, temperature: float, beta: float
) -> Tensor:
    log_q = z / temperature - student[:, None]
    log_p = t / temperature - other[:, None]
    return log_q.exp() * (log_q - log_p - value[:, None]) * (grad * temperature)[:, None]


def _jsd_gradient(
    z: Tensor, t: Tensor, student: Tensor, other: Tensor, value: Tensor, grad: Tensor, temperature: float, beta: float
) -> Tensor:
    log_q, _, log_m = _logs(z, t, student, other, beta, temperature)
    return log_q.exp() * (log_q - log_m - value[:, None]) * (grad * ((1 - beta) * temperature))[:, None]


STEPS = {"forward-kl": _forward_kl_step, "reverse-kl": _reverse_kl_step, "jsd": _both_lse_step}
GRADIENTS = {"forward-kl": _forward_kl_gradient, "reverse-kl": _reverse_kl_gradient, "jsd": _jsd_gradient}


def at_label(z_pv: Tensor, labels_p: Tensor, columns: slice) -> Tensor:
    """The logits at the labels that lie within the block, zero elsewhere: `[p]`."""
    inside_p = (labels_p >= columns.start) & (labels_p < columns.stop)
    index_p = (labels_p - columns.start).clamp(0, columns.stop - columns.start - 1)
    taken_p: Tensor = z_pv.gather(1, index_p[:, None])[:, 0] * inside_p
    return taken_p
