"""Losses and their gradients in one pass over the tokens: what each token counts must be known beforehand.

`in_blocks.losses` computes every logit twice, forward and backward, because a token's part of the gradient is known
only when the backward pass comes. A training step knows it before: the weights of the means. Then some tokens' logits
over the whole vocabulary are computed once, turned into losses and gradient, and dropped, as Liger Kernel's chunked
losses do (Hsu et al., arXiv:2410.10989); logits, and sums of the output matrix's gradient over the parts, are float32
here. A tenth of a step's products less where the output matrix is a fifth of the model; memory is that of `BUDGET`
logits of each model, whatever the vocabulary. On a GPU, compiled: a CPU is quicker with blocks that fit its cache.

Shapes: P tokens, p tokens at a time, V vocabulary, H hidden size
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compress.losses.arithmetic import GRADIENTS, jsd_step, probability
from compress.losses.heads import DenseTeacher, Head, product, through, wide
from compress.losses.in_blocks import IGNORED, Objective, compiled

# Logits of each model held at once.
BUDGET = 1 << 28
# Rows of the output matrix whose gradient is added to at a time.
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """What a token's divergence and cross-entropy count in the total, `[P]` float32; None leaves that loss out."""

    divergence_P: Tensor | None
    cross_entropy_P: Tensor | None


def total(
    hidden_PH: Tensor,
    head: Head,
    teacher: DenseTeacher | None,
    labels_P: Tensor,
    objective: Objective,
    weights: Weights,
    *,
    budget: int = BUDGET,
    fuse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, divergence_P, entropy_P): the weighted sum of both, differentiable; each token's, in nats, are not.

    Arguments as of `in_blocks.losses`. Cross-entropy is zero where nothing counts it. The gradient is computed with the
    value, so it can be asked for once.
    """
    kind = hidden_PH.device.type
    if torch.is_autocast_enabled(kind):
        hidden_PH = hidden_PH.to(torch.get_autocast_dtype(kind))
    if teacher is not None and teacher.hidden_PH.dtype != hidden_PH.dtype:
        teacher = DenseTeacher(hidden_PH=teacher.hidden_PH.to(hidden_PH.dtype), head=teacher.head)
    vocabulary = head.weight_VH.shape[0] if teacher is None else min(head.weight_VH.shape[0], teacher.vocabulary)
    job = _Job(head, teacher, labels_P, objective, weights, vocabulary, max(1, budget // vocabulary), fuse)
    with torch.autocast(kind, enabled=False):
        found: tuple[Tensor, Tensor, Tensor] = _AtOnce.apply(hidden_PH, head.weight_VH, head.bias_V, job)  # type: ignore[no-untyped-call]
    return found


@dataclass(frozen=True, eq=False)
class _Job:
    head: Head
    teacher: DenseTeacher | None
    labels_P: Tensor
    objective: Objective
    weights: Weights
    vocabulary: int
    most: int
    fuse: bool

    def slices(self, count: int) -> list[slice]:
        """Tokens at a time: as few parts as the budget allows, of one size where the count can be parted so."""
        parts = -(-count // self.most)
        even = next((n for n in range(parts, min(2 * parts, count) + 1) if count % n == 0), parts)
        size = -(-count // even)
        return [slice(i, min(i + size, count)) for i in range(0, count, size)]


class _AtOnce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_PH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, job: _Job
    ) -> tuple[Tensor, Tensor, Tensor]:
        count, numbers = len(hidden_PH), wide(hidden_PH.dtype)
        losses_P = [torch.zeros(count, dtype=numbers, device=hidden_PH.device) for _ in range(2)]
        whole = torch.zeros((), dtype=numbers, device=hidden_PH.device)
        grad_hidden = torch.empty_like(hidden_PH)
        grad_weight = torch.zeros_like(weight_VH, dtype=numbers) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias_V, dtype=numbers) if bias_V is not None and ctx.needs_input_grad[2] else None
        used_VH = weight_VH[: job.vocabulary].to(hidden_PH.dtype)
        head = replace(job.head, weight_VH=used_VH)
        for rows in job.slices(count):
            divergence_p, entropy_p, part, grad_pV = _part(hidden_PH, rows, head, job)
            losses_P[0][rows], losses_P[1][rows] = divergence_p, entropy_p
            whole += part
            if grad_bias is not None:
                grad_bias[: job.vocabulary] += grad_pV.sum(0, dtype=numbers)
            grad_hidden[rows] = grad_pV @ used_VH
            for start in range(0, job.vocabulary, _ROWS_AT_ONCE) if grad_weight is not None else ():
                of = slice(start, min(start + _ROWS_AT_ONCE, job.vocabulary))
                grad_weight[of] += product(grad_pV[:, of].t(), hidden_PH[rows])  # type: ignore[index]
        ctx.grads = [grad_hidden, grad_weight, grad_bias]
        ctx.dtypes = [hidden_PH.dtype, weight_VH.dtype, None if bias_V is None else bias_V.dtype]
        ctx.mark_non_differentiable(*losses_P)
        return whole, losses_P[0], losses_P[1]

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("this loss's gradient was asked for already")
        return (*(None if g is None else g.mul_(outer[0]).to(d) for g, d in zip(grads, ctx.dtypes, strict=True)), None)


def _part(hidden_PH: Tensor, rows: slice, head: Head, job: _Job) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of some tokens: divergence, cross-entropy, what they add to the total, and its gradient by `W h + b`."""
    weights, objective = job.weights, job.objective
    z_pV = head.logits(hidden_PH[rows], slice(0, job.vocabulary))
    t_pV = None
    if job.teacher is not None:
        t_pV = job.teacher.head.logits(job.teacher.hidden_PH[rows], slice(0, job.vocabulary))
    of = [None if w is None else w[rows] for w in (weights.divergence_P, weights.cross_entropy_P)]
    if t_pV is not None and of[0] is not None and of[1] is None and _has_kernel(z_pV, job):
        return _by_kernel(z_pV, t_pV, of[0], head, objective.temperature, hidden_PH.dtype)
    step = compiled(whole_rows) if job.fuse else whole_rows
    found: tuple[Tensor, Tensor, Tensor, Tensor] = step(
        z_pV, t_pV, job.labels_P[rows], of[0], of[1], objective.kind, objective.temperature, objective.beta,
        head.scale, head.cap, hidden_PH.dtype,
    )  # fmt: skip
    return found


def _has_kernel(z_pV: Tensor, job: _Job) -> bool:
    """Whether a kernel does what `whole_rows` would with the divergence alone, where no compiler is asked for.

    A GPU has Triton: what asks for no compiler, learning through a quantized model, came by way of `feedback_step`.
    """
    return z_pV.is_cuda and z_pV.dtype == torch.float32 and job.objective.kind == "forward-kl" and not job.fuse


def _by_kernel(
    z_pV: Tensor, t_pV: Tensor, count_p: Tensor, head: Head, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from compress.losses.forward_kl_triton import forward_kl

    value_p, grad_pV = forward_kl(z_pV, t_pV, count_p, temperature, head.scale, head.cap, dtype)
    divergence_p = value_p * temperature**2
    return divergence_p, torch.zeros_like(divergence_p), (divergence_p * count_p).sum(), grad_pV


def whole_rows(
    z: Tensor, t: Tensor | None, labels: Tensor, count_divergence: Tensor | None, count_entropy: Tensor | None,
    kind: str, temperature: float, beta: float, scale: float, cap: float | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(divergence, cross-entropy, their weighted sum, its gradient by `W h + b` in `dtype`) of logits `[p, V]`.

    No matrix product and no scatter, so that a compiler makes a few passes over the logits of it.
    """
    zero = torch.zeros_like(z[:, 0])
    divergence, entropy, part = zero, zero, zero.sum()
    grad = None
    if t is not None and count_divergence is not None:
        student, other = _tempered(z, temperature).logsumexp(-1), _tempered(t, temperature).logsumexp(-1)
        if kind == "forward-kl":
            value, grad = _forward_kl(z, t, student, other, count_divergence, temperature)
        else:
            value, extra = _divergence(z, t, student, other, kind, temperature, beta)
            grad = GRADIENTS[kind](z, t, student, other, extra, count_divergence, temperature, beta)
        divergence = value * temperature**2
        part = part + (divergence * count_divergence).sum()
    if count_entropy is not None:
        known = labels != IGNORED
        lse = z.logsumexp(-1)
        entropy = (lse - z.gather(1, labels.clamp(min=0)[:, None])[:, 0]) * known
        count = count_entropy * known
        is_label = torch.arange(z.shape[1], device=z.device)[None] == labels[:, None]
        more = probability(z, lse, count, 1.0) - torch.where(is_label, count[:, None], 0.0)
        grad = more if grad is None else grad + more
        part = part + (entropy * count).sum()
    if grad is None:
        grad = torch.zeros_like(z)
    return divergence, entropy, part, through(grad, z, scale, cap).to(dtype)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """The quotient; that by 1 is the logits, to the bit, and a pass over them less."""
    return logits if temperature == 1 else logits / temperature


def _forward_kl(
    z: Tensor, t: Tensor, student: Tensor, other: Tensor, count: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """As `_divergence`, and its gradient: to the bit `GRADIENTS["forward-kl"]`, in fewer passes over the logits."""
    log_q = _tempered(z, temperature) - student[:, None]
    log_p = _tempered(t, temperature) - other[:, None]
    p = log_p.exp()
    value = (log_p - log_q).mul_(p).sum(-1)
    return value, log_q.exp_().sub_(p).mul_((count * temperature)[:, None])


def _divergence(
    z: Tensor, t: Tensor, student: Tensor, other: Tensor, kind: str, temperature: float, beta: float
) -> tuple[Tensor, Tensor]:
    """A divergence that is not the forward one (before the factor T^2), and what its gradient needs of it; see
    `in_blocks._divergence`."""
    if kind == "jsd":
        to_teacher, to_student = jsd_step(z, t, student, other, beta, temperature)
        return beta * to_teacher + (1 - beta) * to_student, to_student
    log_q, log_p = z / temperature - student[:, None], t / temperature - other[:, None]
    value = (log_q.exp() * (log_q - log_p)).sum(-1)
    return value, value
