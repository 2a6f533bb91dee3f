"""The student as it is trained: its forward is the loss, so that whatever shards or copies it sees every use.

Shapes: B rows, T tokens, P = B * T, H hidden size
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.distill.models import LoadedModel, head_of
from compress.distill.one_text import as_known
from compress.distill.onpolicy import rewrite
from compress.distill.rows import Batch
from compress.losses import at_once
from compress.losses.at_once import Weights
from compress.losses.heads import SparseTeacher, Teacher
from compress.losses.in_blocks import IGNORED, Objective, losses

PARTS = ("divergence", "cross_entropy", "hidden")


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is minimised: `divergence + ce * cross_entropy + hidden * hidden_distance`; see `PARTS`.

    objective None: no teacher, cross-entropy alone (weight `ce`).
    """

    objective: Objective | None = field(default_factory=Objective)
    ce: float = 0.0
    hidden: float = 0.0

    @property
    def weights(self) -> tuple[float, float, float]:
        return (0.0 if self.objective is None else 1.0, self.ce, self.hidden)


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """What the teacher says about a batch: its distributions, and hidden states `[B, T, H]` to be met, if asked for.

    counted_P: which tokens the divergence is taken over (bool), None for all of them.
    """

    teacher: Teacher | None
    states: tuple[Tensor, ...] = ()
    counted_P: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """One forward pass of the student."""

    batch: Batch
    lesson: Lesson


@dataclass(frozen=True, kw_only=True, eq=False)
class Rewrite:
    """Continue a batch's rows with the student's own text; see `onpolicy.rewrite`."""

    batch: Batch
    uniform_BT: Tensor
    num_ids: int


class Student(nn.Module):
    """See the module docstring. states: which of the student's hidden states are to meet the lesson's, in its order.

    Hidden states are numbered as transformers does: 0 enters the first block, the last has passed the final norm.
    """

    def __init__(self, loaded: LoadedModel, goal: Goal, *, states: Sequence[int] = (), fuse: bool = False) -> None:
        super().__init__()
        self.model = loaded.model
        self._loaded = loaded
        self._goal = goal
        self._states = tuple(states)
        self._fuse = fuse
        self._compute: torch.dtype | None = None

    def compute_in(self, dtype: torch.dtype | None, *, narrow: bool = False) -> None:
        """Use autocast to `dtype`; None computes in the weights' own. narrow: what runs between blocks is in it too."""
        self._compute = dtype
        if dtype is not None and narrow:
            self.model.get_input_embeddings().register_forward_hook(lambda module, ids, out: out.to(dtype))  # type: ignore[operator]

    def forward(self, study: Study | Rewrite) -> tuple[Any, Tensor]:
        """(loss, parts `[3]` without gradient): means over the batch's tokens, in nats a token; see `PARTS`.

        For a `Rewrite`: (batch, tokens to be counted).
        """
        if isinstance(study, Rewrite):
            return self._rewritten(study)
        batch = study.batch
        kind = batch.ids_BT.device.type
        with torch.autocast(kind, self._compute, enabled=self._compute is not None), as_known(batch):
            out = self._loaded.base(
                input_ids=batch.ids_BT,
                position_ids=batch.positions_BT,
                use_cache=False,
                output_hidden_states=bool(self._states),
            )
            total, parts = self._loss(study, out)
        return total, torch.stack([p.detach() for p in parts])

    def _rewritten(self, task: Rewrite) -> tuple[Batch, Tensor]:
        training = self.training
        self.eval()  # checkpointed blocks keep no cache of keys while training
        try:
            # shapes change from token to token: nothing to compile
            kind, narrowed = task.batch.ids_BT.device.type, self._compute is not None
            with torch.compiler.set_stance("force_eager"), torch.autocast(kind, self._compute, enabled=narrowed):
                return rewrite(self.model, task.batch, task.uniform_BT, task.num_ids)
        finally:
            self.train(training)

    def _loss(self, study: Study, out: Any) -> tuple[Tensor, list[Tensor]]:
        """What is minimised, and its parts. Where losses are compiled, an update's gradient is computed with them."""
        hidden_PH = _as_narrow_as(head_of(self._loaded).weight_VH, out.last_hidden_state.flatten(0, 1))
        labels_P = study.batch.labels_BT.flatten()
        sparse = isinstance(study.lesson.teacher, SparseTeacher)
        if self._fuse and torch.is_grad_enabled() and not sparse:
            total, parts = self._at_once(study.lesson, hidden_PH, labels_P)
        else:
            parts = self._in_blocks(study.lesson, hidden_PH, labels_P)
            total = torch.stack([w * p for w, p in zip(self._goal.weights, parts, strict=False) if w]).sum()
        if not self._states:
            return total, [*parts, torch.zeros_like(parts[0])]
        mine = [out.hidden_states[i] for i in self._states]
        distances = [_distance(a, b) for a, b in zip(mine, study.lesson.states, strict=True)]
        parts.append(torch.stack(distances).mean())
        return total + self._goal.hidden * parts[-1], parts

    def _in_blocks(self, lesson: Lesson, hidden_PH: Tensor, labels_P: Tensor) -> list[Tensor]:
        """Divergence and cross-entropy, differentiable, by `in_blocks.losses`."""
        divergence_P, entropy_P = losses(
            hidden_PH,
            head_of(self._loaded),
            lesson.teacher,
            labels_P if self._goal.ce or self._goal.objective is None or not self.training else None,
            self._goal.objective or Objective(),
            fuse=self._fuse,
        )
        counted_P = lesson.counted_P
        divergence = divergence_P.mean() if counted_P is None else (divergence_P * counted_P).sum() / counted_P.sum()
        return [divergence, entropy_P.sum() / _known(labels_P)]

    def _at_once(self, lesson: Lesson, hidden_PH: Tensor, labels_P: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The total, differentiable, and divergence and cross-entropy, by `at_once.total`."""
        assert not isinstance(lesson.teacher, SparseTeacher)
        of_divergence, of_entropy, _ = self._goal.weights
        counted_P = torch.ones_like(labels_P) if lesson.counted_P is None else lesson.counted_P
        share_P = counted_P.float() / counted_P.sum()
        known_P = (labels_P != IGNORED).float() / _known(labels_P)
        weights = Weights(
            divergence_P=of_divergence * share_P if of_divergence else None,
            cross_entropy_P=of_entropy * known_P if of_entropy else None,
        )
        objective = self._goal.objective or Objective()
        total, divergence_P, entropy_P = at_once.total(
            hidden_PH, head_of(self._loaded), lesson.teacher, labels_P, objective, weights, fuse=True
        )
        return total, [(divergence_P * share_P).sum(), (entropy_P * known_P).sum()]


def _as_narrow_as(weight_VH: Tensor, hidden_PH: Tensor) -> Tensor:
    """Hidden states in the dtype of 16-bit weights, as FSDP2 gathers them: a norm may have left it, and losses multiply
    in the dtype of the hidden states."""
    return hidden_PH.to(weight_VH.dtype) if weight_VH.dtype.itemsize < hidden_PH.dtype.itemsize else hidden_PH


def _known(labels_P: Tensor) -> Tensor:
    """How many labels there are, at least 1."""
    return (labels_P != IGNORED).sum().clamp(min=1)


def _distance(mine_BTH: Tensor, theirs_BTH: Tensor) -> Tensor:
    """Mean over tokens of `|a - b|^2 / |b|^2`: relative, because a few tokens have states a hundred times larger."""
    theirs = theirs_BTH.float()
    error_BT = (mine_BTH.float() - theirs).square().sum(-1)
    return (error_BT / theirs.square().sum(-1).clamp(min=1e-12)).mean()


def matching_states(num_student: int, num_teacher: int, kept: Sequence[int] | None) -> tuple[list[int], list[int]]:
    """Which hidden states of a student of `num_student` blocks should meet which of its teacher's.

    kept: the teacher's block that each of the student's was; then what leaves a block should be what enters the next
    kept one, as if the blocks between had been run. Without: evenly spread.
    """
    student = list(range(1, num_student + 1))
    if kept is not None:
        return student, [*kept[1:], num_teacher]
    return student, [round(j * num_teacher / num_student) for j in student]
