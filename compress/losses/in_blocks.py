"""How far a student's predictions lie from its teacher's, and from the text, without ever holding either's logits.

Both models' logits of a batch are `[tokens, vocabulary]` matrices of gigabytes. Here they exist one block at a time:
some tokens times some of the vocabulary. The forward pass goes over the blocks once and keeps running maxima and sums
(the online softmax of Milakov and Gimelshein, arXiv:1805.02867); the backward pass computes each block again and turns
it into its part of the gradients. Memory is that of a few blocks, whatever the batch and the vocabulary.

With student probabilities q, teacher probabilities p, both at temperature T, in nats a token and times T^2 (so that
gradients keep their size, Hinton et al., arXiv:1503.02531):

    forward-kl   sum p log(p / q)      the student must cover what the teacher does
    reverse-kl   sum q log(q / p)      the student must not do what the teacher does not
    jsd          b sum p log(p / m) + (1 - b) sum q log(q / m),   m = b p + (1 - b) q     (arXiv:2306.13649)

Shapes: P tokens (positions), V vocabulary, H hidden size of either model, K entries of a sparse teacher
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.losses.arithmetic import (
    GRADIENTS,
    STEPS,
    Running,
    at_label,
    jsd_step,
    lse_step,
    probability,
    sparse_step,
)
from compress.losses.heads import DenseTeacher, Head, SparseTeacher, Teacher, product, wide

KINDS = ("forward-kl", "reverse-kl", "jsd")
IGNORED = -100
# Logits in a block: on a CPU what its cache holds, on a GPU what keeps its units busy.
CPU_BLOCK = (512, 4096)
GPU_BLOCK = (4096, 8192)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """kind: one of `KINDS`. temperature: of both distributions. beta: the teacher's weight in `jsd`'s mixture."""

    kind: str = "forward-kl"
    temperature: float = 1.0
    beta: float = 0.5


def losses(
    hidden_PH: Tensor,
    head: Head,
    teacher: Teacher | None,
    labels_P: Tensor | None,
    objective: Objective,
    *,
    block: tuple[int, int] | None = None,
    fuse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Divergence from the teacher and cross-entropy with the text, each `[P]` in nats a token.

    Differentiable with respect to the student's hidden states and head.

    labels_P: int64, the token that follows; `IGNORED` gives zero. Without a teacher or labels that part is zero. The
    vocabulary is the shorter of the two models' (what lies behind is padding). block: tokens and vocabulary entries
    computed at a time. fuse: compile the arithmetic of a block (`torch.compile`). Under autocast, matrix products are
    in its dtype; sums are float32.
    """
    kind = hidden_PH.device.type
    if torch.is_autocast_enabled(kind):
        hidden_PH = hidden_PH.to(torch.get_autocast_dtype(kind))
    if isinstance(teacher, DenseTeacher) and teacher.hidden_PH.dtype != hidden_PH.dtype:
        teacher = DenseTeacher(hidden_PH=teacher.hidden_PH.to(hidden_PH.dtype), head=teacher.head)
    vocabulary = head.weight_VH.shape[0]
    if teacher is not None:
        vocabulary = min(vocabulary, teacher.vocabulary)
    job = _Job(
        head=head,
        teacher=teacher,
        labels_P=labels_P,
        objective=objective,
        vocabulary=vocabulary,
        block=block or (GPU_BLOCK if hidden_PH.is_cuda else CPU_BLOCK),
        fuse=fuse,
    )
    with torch.autocast(kind, enabled=False):
        found: tuple[Tensor, Tensor] = _Blockwise.apply(hidden_PH, head.weight_VH, head.bias_V, job)  # type: ignore[no-untyped-call]
    return found


# ---- one block after another -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    head: Head
    teacher: Teacher | None
    labels_P: Tensor | None
    objective: Objective
    vocabulary: int
    block: tuple[int, int]
    fuse: bool

    def rows(self, count: int) -> Iterator[slice]:
        return _slices(count, self.block[0])

    def columns(self) -> Iterator[slice]:
        return _slices(self.vocabulary, self.block[1])

    def function(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        return compiled(plain) if self.fuse else plain


class _Blockwise(torch.autograd.Function):
    """(divergence_P, cross_entropy_P) of (hidden_PH, weight_VH, bias_V); see `losses`."""

    @staticmethod
    def forward(
        ctx: Any, hidden_PH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, job: _Job
    ) -> tuple[Tensor, Tensor]:
        parts = [_forward_rows(hidden_PH[rows], rows, job) for rows in job.rows(len(hidden_PH))]
        divergence_P, entropy_P, *sums = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.job = job
        ctx.save_for_backward(hidden_PH, weight_VH, bias_V, *sums)
        return divergence_P, entropy_P

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        hidden_PH, weight_VH, bias_V, *sums = ctx.saved_tensors
        job: _Job = ctx.job
        need_hidden, need_weight, need_bias, _ = ctx.needs_input_grad
        sums_in = wide(hidden_PH.dtype)
        grad_hidden = torch.zeros_like(hidden_PH, dtype=sums_in) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VH) if need_weight else None
        grad_bias = torch.zeros_like(bias_V) if need_bias and bias_V is not None else None
        for columns in job.columns():
            weight_vH = weight_VH[columns].to(hidden_PH.dtype)
            sum_vH = torch.zeros_like(weight_vH, dtype=sums_in) if need_weight else None
            for rows in job.rows(len(hidden_PH)):
                hidden_pH = hidden_PH[rows]
                grad_pv = _backward_block(
                    hidden_pH, rows, columns, job, [s[rows] for s in sums], [g[rows] for g in grads]
                )
                if grad_bias is not None:
                    grad_bias[columns] += grad_pv.sum(0)
                grad_pv = grad_pv.to(hidden_pH.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] += product(grad_pv, weight_vH)
                if sum_vH is not None:
                    sum_vH += product(grad_pv.t(), hidden_pH)
            if grad_weight is not None and sum_vH is not None:
                grad_weight[columns] = sum_vH
        return (None if grad_hidden is None else grad_hidden.to(hidden_PH.dtype)), grad_weight, grad_bias, None


def _forward_rows(hidden_pH: Tensor, rows: slice, job: _Job) -> tuple[Tensor, ...]:
    """Of some tokens: divergence, cross-entropy, and the sums that the backward pass needs."""
    temperature = job.objective.temperature
    teacher = None if job.teacher is None else job.teacher.rows(rows)
    labels_p = None if job.labels_P is None else job.labels_P[rows]
    start = Running.start(hidden_pH)
    plain, student, other = start, start, start
    label_p = start.weighted.clone()
    for columns in job.columns():
        z_pv = job.head.logits(hidden_pH, columns)
        if labels_p is not None:
            plain = Running(*job.function(lse_step)(*plain, z_pv))
            label_p += at_label(z_pv, labels_p, columns)
        if isinstance(teacher, DenseTeacher):
            t_pv = teacher.head.logits(teacher.hidden_PH, columns)
            step = job.function(STEPS[job.objective.kind])
            student, other = (Running(*r) for r in step(tuple(student), tuple(other), z_pv, t_pv, temperature))
        elif teacher is not None:
            student = Running(*job.function(sparse_step)(*student, z_pv, *teacher.within(columns), temperature))
    known = torch.ones_like(label_p) if labels_p is None else (labels_p != IGNORED).to(label_p.dtype)
    entropy_p = (plain.lse() - label_p) * known if labels_p is not None else torch.zeros_like(label_p)
    divergence_p, extra_p = _divergence(hidden_pH, teacher, student, other, job)
    sums = (plain.lse() if labels_p is not None else label_p, student.lse(), other.lse(), extra_p)
    return divergence_p * temperature**2, entropy_p, *sums


def _divergence(
    hidden_pH: Tensor, teacher: Teacher | None, student: Running, other: Running, job: _Job
) -> tuple[Tensor, Tensor]:
    """The divergence (before the factor T^2), and what its gradient needs of it."""
    if teacher is None:
        zero = torch.zeros_like(student.top)
        return zero, zero
    if isinstance(teacher, SparseTeacher):
        mass_p = teacher.mass_PK.sum(-1).to(student.top.dtype)
        return student.lse() * mass_p - student.weighted - teacher.entropy_P.to(student.top.dtype), mass_p
    if job.objective.kind == "forward-kl":
        value_p = other.weighted / other.total - other.lse() + student.lse()
        return value_p, value_p
    if job.objective.kind == "reverse-kl":
        value_p = student.weighted / student.total - student.lse() + other.lse()
        return value_p, value_p
    return _jsd(hidden_pH, teacher, student.lse(), other.lse(), job)


def _jsd(
    hidden_pH: Tensor, teacher: DenseTeacher, student_p: Tensor, teacher_p: Tensor, job: _Job
) -> tuple[Tensor, Tensor]:
    """The mixture's logarithm needs both normalisers first, so this goes over the blocks once more."""
    beta, temperature = job.objective.beta, job.objective.temperature
    to_teacher_p, to_student_p = torch.zeros_like(student_p), torch.zeros_like(student_p)
    for columns in job.columns():
        z_pv = job.head.logits(hidden_pH, columns)
        t_pv = teacher.head.logits(teacher.hidden_PH, columns)
        more = job.function(jsd_step)(z_pv, t_pv, student_p, teacher_p, beta, temperature)
        to_teacher_p, to_student_p = to_teacher_p + more[0], to_student_p + more[1]
    return beta * to_teacher_p + (1 - beta) * to_student_p, to_student_p


def _backward_block(
    hidden_pH: Tensor, rows: slice, columns: slice, job: _Job, sums: list[Tensor], grads: list[Tensor]
) -> Tensor:
    """The gradient with respect to `W h + b` of one block, `[p, v]`."""
    plain_p, student_p, other_p, extra_p = sums
    grad_divergence_p, grad_entropy_p = grads
    objective, temperature = job.objective, job.objective.temperature
    teacher = None if job.teacher is None else job.teacher.rows(rows)
    z_pv = job.head.logits(hidden_pH, columns)
    if isinstance(teacher, DenseTeacher):
        t_pv = teacher.head.logits(teacher.hidden_PH, columns)
        step = job.function(GRADIENTS[objective.kind])
        grad_pv = step(z_pv, t_pv, student_p, other_p, extra_p, grad_divergence_p, temperature, objective.beta)
    elif teacher is not None:
        index_pk, mass_pk = teacher.within(columns)
        grad_pv = job.function(probability)(z_pv, student_p, grad_divergence_p * extra_p * temperature, temperature)
        taken_pk = mass_pk.to(grad_pv.dtype) * (grad_divergence_p * temperature)[:, None]
        grad_pv.scatter_add_(1, index_pk, -taken_pk)
    else:
        grad_pv = torch.zeros_like(z_pv)
    if job.labels_P is not None:
        labels_p = job.labels_P[rows]
        weight_p = grad_entropy_p * (labels_p != IGNORED)
        grad_pv += job.function(probability)(z_pv, plain_p, weight_p, 1.0)
        inside_p = (labels_p >= columns.start) & (labels_p < columns.stop)
        index_p = (labels_p - columns.start).clamp(0, columns.stop - columns.start - 1)
        grad_pv.scatter_add_(1, index_p[:, None], -(weight_p * inside_p)[:, None])
    return job.head.through(grad_pv, z_pv)


_COMPILED: dict[Callable[..., Any], Callable[..., Any]] = {}


def compiled(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The function by `torch.compile`, for the shapes that it meets; the same one for the same function."""
    if plain not in _COMPILED:
        _COMPILED[plain] = torch.compile(plain, dynamic=False)
    return _COMPILED[plain]


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
