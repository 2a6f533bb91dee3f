"""transformers is not asked whether rows are packed where that is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import masking_utils

from compress.distill import models, one_text
from compress.distill.rows import Batch
from compress.distill.student import Goal, Lesson, Student, Study
from compress.distill.teacher import LiveTeacher


def test_no_look_at_rows_of_one_text(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = models.load(pair[0], dtype=torch.float32)
    ids_BT = torch.randint(0, 4096, (2, 16), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids_BT=ids_BT, labels_BT=ids_BT)
    packed = Batch(ids_BT=ids_BT, labels_BT=ids_BT, positions_BT=torch.arange(16).expand(2, 16) % 8)
    taught, student = LiveTeacher(loaded, states=(1,)), Student(loaded, Goal(objective=None, ce=1.0))
    expected = loaded.base(input_ids=ids_BT, use_cache=False).last_hidden_state.flatten(0, 1)

    def look(position_ids: Any) -> None:
        raise RuntimeError("looked")

    assert hasattr(masking_utils, one_text.LOOK)
    monkeypatch.setattr(masking_utils, one_text.LOOK, look)
    assert torch.equal(taught.hidden(batch), expected)
    assert taught.lesson(batch).teacher is not None
    assert student(Study(batch=batch, lesson=Lesson(teacher=None)))[0] > 0
    assert getattr(masking_utils, one_text.LOOK) is look
    for ask in (taught.hidden, taught.lesson, lambda b: student(Study(batch=b, lesson=Lesson(teacher=None)))):
        with pytest.raises(RuntimeError, match="looked"):
            ask(packed)
