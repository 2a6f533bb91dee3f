"""A teacher that several processes share keeps no block whole once it has run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from compress.distill import models, teacher
from compress.distill.rows import Batch
from compress.distill.teacher import LiveTeacher


@pytest.mark.slow
def test_a_shared_teacher_is_given_back_and_says_the_same(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """One process that meets itself: FSDP2 gathers and gives back as among several."""
    ids_BT = torch.randint(0, 4096, (2, 16), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids_BT=ids_BT, positions_BT=torch.arange(16).expand(2, 16), labels_BT=ids_BT)
    expected = LiveTeacher(models.load(pair[0], dtype=torch.float32)).hidden(batch)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        loaded = models.load(pair[0], dtype=torch.float32)
        teacher.shard(loaded)
        for _ in range(2):
            assert torch.equal(LiveTeacher(loaded).hidden(batch), expected)
            assert all(isinstance(p, DTensor) for block in loaded.blocks for p in block.parameters())
        head = models.head_of(loaded).weight_VH
        assert not isinstance(head, DTensor) and head.shape == (4096, 32)
    finally:
        dist.destroy_process_group()
