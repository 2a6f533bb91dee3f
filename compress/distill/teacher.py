"""The teacher as a lesson is taken from it: no gradients, its logits never whole.

Shapes: B rows, T tokens, P = B * T, H hidden size
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from compress.distill.models import LoadedModel, head_of
from compress.distill.one_text import as_known
from compress.distill.rows import Batch
from compress.distill.student import Lesson
from compress.losses.heads import DenseTeacher


class Lessons(Protocol):
    """Where the teacher's word on a batch comes from: a model in memory, a cache, or nowhere."""

    def lesson(self, batch: Batch) -> Lesson: ...


class NoLessons:
    """Training on the text alone."""

    def lesson(self, batch: Batch) -> Lesson:
        return Lesson(teacher=None)


class LiveTeacher:
    """A model in memory. states: which of its hidden states a lesson holds."""

    def __init__(self, loaded: LoadedModel, states: Sequence[int] = ()) -> None:
        self.loaded = loaded
        self.states = tuple(states)
        loaded.model.requires_grad_(False)

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states `[P, H]`."""
        with as_known(batch):
            out = self.loaded.base(input_ids=batch.ids_BT, position_ids=batch.positions_BT, use_cache=False)
        last: Tensor = out.last_hidden_state
        return last.flatten(0, 1)

    @torch.no_grad()
    def lesson(self, batch: Batch) -> Lesson:
        with as_known(batch):
            out = self.loaded.base(
                input_ids=batch.ids_BT,
                position_ids=batch.positions_BT,
                use_cache=False,
                output_hidden_states=bool(self.states),
            )
        dense = DenseTeacher(hidden_PH=out.last_hidden_state.flatten(0, 1), head=head_of(self.loaded))
        return Lesson(teacher=dense, states=tuple(out.hidden_states[i] for i in self.states))


def shard(loaded: LoadedModel) -> None:
    """Keep a share of each block's weights in every process, and gather a block when it runs (FSDP2).

    The blocks have a root in common, or each would be one, and FSDP2 never gives back what a root has gathered; and one
    block is gathered while the one before it runs. What is outside of blocks stays whole: the losses read the head.
    """
    from torch.distributed.fsdp import fully_shard

    block: nn.Module
    for block in loaded.blocks:
        fully_shard(block)
    inside = {p for block in loaded.blocks for p in block.parameters()}
    kind = type(loaded.base)
    fully_shard(loaded.base, ignored_params={p for p in loaded.base.parameters() if p not in inside})
    # it made a class of its own of it, and transformers knows by its class which hidden states a model can give
    loaded.base.__class__ = kind
