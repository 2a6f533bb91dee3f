"""Every metric of one dense folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple


class Question(NamedTuple):
    """What is measured. tokenizer: the folder of the original, so that no rival can change the text's tokens.

    texts: name and file, perplexity over the first `windows` windows of each. last_word: LAMBADA's file or None,
    its first `items` items.
    """

    tokenizer: Path
    texts: dict[str, Path]
    windows: int
    last_word: Path | None
    items: int | None
    device: str
    threads: int


def judge(folder: Path, question: Question) -> dict[str, Any]:
    """Name of text -> NLL of each window; "last_word" -> see `metrics.last_word`. Imports torch."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from metrics.last_word import last_word
    from metrics.perplexity import window_nll
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(question.threads)
    encode = AutoTokenizer.from_pretrained(question.tokenizer)
    out: dict[str, Any] = {
        name: window_nll(folder, encode, text, question.windows, question.device)
        for name, text in question.texts.items()
    }
    if question.last_word is not None:
        out["last_word"] = last_word(folder, encode, question.last_word, question.items, question.device)
    return out
