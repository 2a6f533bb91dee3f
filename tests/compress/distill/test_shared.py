"""Models that several processes share (FSDP2): a teacher keeps no block whole, losses multiply in 16 bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from compress.distill import models, teacher
from compress.distill.engine import EngineOptions, shared_precision
from compress.distill.rows import Batch
from compress.distill.student import Goal, Lesson, Student, Study
from compress.distill.teacher import LiveTeacher


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """One process that meets itself: FSDP2 gathers, casts and gives back as among several."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def some_rows() -> Batch:
    ids_BT = torch.randint(0, 4096, (2, 16), generator=torch.Generator().manual_seed(0))
    return Batch(ids_BT=ids_BT, positions_BT=torch.arange(16).expand(2, 16), labels_BT=ids_BT)


def test_a_shared_teacher_is_given_back_and_says_the_same(pair: tuple[Path, Path], alone: None) -> None:
    batch = some_rows()
    whole = LiveTeacher(models.load(pair[0], dtype=torch.float32), states=(1, 3))
    expected, states = whole.hidden(batch), whole.lesson(batch).states
    loaded = models.load(pair[0], dtype=torch.float32)
    teacher.shard(loaded)
    for _ in range(2):
        assert torch.equal(LiveTeacher(loaded).hidden(batch), expected)
        found = LiveTeacher(loaded, states=(1, 3)).lesson(batch).states
        assert all(torch.equal(a, b) for a, b in zip(found, states, strict=True))
        assert all(isinstance(p, DTensor) for block in loaded.blocks for p in block.parameters())
    head = models.head_of(loaded).weight_VH
    assert not isinstance(head, DTensor) and head.shape == (4096, 32)


def test_a_shared_students_losses_multiply_in_sixteen_bits(pair: tuple[Path, Path], alone: None) -> None:
    """In float32, the products with the output matrix take longer than all else in a model of 1 B parameters."""
    from torch.distributed.fsdp import fully_shard

    loaded = models.load(pair[0], dtype=torch.float32)
    loaded.model.requires_grad_(True)
    student = Student(loaded, Goal(objective=None, ce=1.0))
    policy = shared_precision(EngineOptions(compute=torch.bfloat16))
    for block in loaded.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(student, mp_policy=policy)
    seen: list[torch.dtype] = []

    def look(module: Any, arguments: Any, out: Any) -> None:
        seen.extend([out.last_hidden_state.dtype, models.head_of(loaded).weight_VH.dtype])

    loaded.base.register_forward_hook(look)
    loss, _ = student(Study(batch=some_rows(), lesson=Lesson(teacher=None)))
    loss.backward()
    assert seen == [torch.bfloat16, torch.bfloat16] and loss.dtype == torch.float32
    gradients = [p.grad for p in student.parameters()]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)
