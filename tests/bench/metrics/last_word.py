"""LAMBADA: is the last word of a passage the model's greedy continuation? Judged by `evaluators.tasks`."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def last_word(model: Path, encode: Any, file: Path, limit: int | None, device: str) -> dict[str, list[float]]:
    """Of each of the first `limit` items: correct (1 or 0), and nll, that of the right word in nats.

    encode: a tokenizer.
    """
    import torch

    from compress.runtime.streamed import TorchRunner
    from evaluators import tasks
    from evaluators.windows import bos_id

    task = tasks.load_task(str(file), limit)
    asked = tasks.requests(task, encode, front=bos_id(encode, "auto"), max_length=512)
    with torch.no_grad():
        reading = TorchRunner.open(model, device=device).read([request.tokens for request in asked])
        answers = tasks.score(task, asked, reading, 0)
        reading.close()
    return {
        "correct": [int(correct) for correct in answers.correct_N],
        "nll": [round(-float(likelihood), 5) for likelihood in answers.gold_N],
    }
