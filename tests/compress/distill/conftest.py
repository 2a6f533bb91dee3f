"""A small teacher, a student of one block less, and text for both."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import calibration_data

WORDS = "the old house stood by the river and nobody had lived there for many years since the war".split()
SMALL = {
    "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def save_small(folder: Path, num_blocks: int, **changes: Any) -> Path:
    """A Llama of random weights with the reference tokenizer, norms perturbed."""
    import torch
    import transformers

    sizes: dict[str, Any] = {**SMALL, **changes}
    config = transformers.LlamaConfig(num_hidden_layers=num_blocks, tie_word_embeddings=True, **sizes)
    torch.manual_seed(num_blocks)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.2)
    model.half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((calibration_data.reference_model() / name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a teacher of three blocks and a student of two."""
    folder = tmp_path_factory.mktemp("pair")
    return save_small(folder / "teacher", 3), save_small(folder / "student", 2)


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """(number of documents, seed) -> a .jsonl of short documents."""
    folder = tmp_path_factory.mktemp("prose")

    def make(documents: int, seed: int = 0) -> Path:
        path = folder / f"{documents}-{seed}.jsonl"
        chance = random.Random(seed)
        rows = [{"text": " ".join(chance.choices(WORDS, k=chance.randint(5, 60)))} for _ in range(documents)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return make
