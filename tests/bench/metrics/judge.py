"""Every metric of one dense folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple


class Question(NamedTuple):
    """What is measured. original: the folder of the model before, whose tokenizer is used and whose predictions are
    those that KL is measured from, so that no rival can change either.

    texts: name and file, perplexity and KL over `windows` windows of each from number `first` on. last_word: LAMBADA's
    file or None, its first `items` items. conversations: see `metrics.conversations`, or None.
    """

    original: Path
    texts: dict[str, Path]
    first: int
    windows: int
    last_word: Path | None
    items: int | None
    conversations: Path | None
    device: str
    threads: int


def judge(folder: Path, question: Question) -> dict[str, Any]:
    """Under "texts" by name the `nll` and `kl` of each window, under "conversations" the KL of each, "last_word" is
    of `metrics.last_word`. Of the original itself (`folder` is it) there is no KL. Imports torch."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from metrics import conversations, perplexity
    from metrics.last_word import last_word
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(question.threads)
    encode = AutoTokenizer.from_pretrained(question.original)

    def load(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().to(question.device)

    lm = load(folder)
    original = None if folder == question.original else load(question.original)
    out: dict[str, Any] = {"texts": {}}
    for name, text in question.texts.items():
        ids_NT = perplexity.windows(encode, text, question.first, question.windows)
        out["texts"][name] = perplexity.losses(lm, original, ids_NT)
    if question.conversations is not None and original is not None:
        out["conversations"] = conversations.divergence(lm, original, question.conversations)
    del lm, original
    if question.last_word is not None:
        out["last_word"] = last_word(folder, encode, question.last_word, question.items, question.device)
    return out
