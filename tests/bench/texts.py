"""Calibration text for a seed: seed s starts at the line after the rows of seed s - 1, so no two seeds share a token.

The text of a seed is the original with its first lines (.txt) or rows (.jsonl) left out. `compress awq` is given that
text, the rivals are given the ids that `compress.calibration` makes of it: the same ids by the same function, and
`compress awq` writes their hash into its manifest, so that it can be checked.
"""

# Shapes: N calibration rows, T tokens of a row

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class CalibrationText(NamedTuple):
    """text: what `compress awq --calib` reads. ids: int64 [N, T], .npy. sha256: `tokens.ids_sha256` of them."""

    text: Path
    ids: Path
    sha256: str


def write_seed(source: Path, seed: int, samples: int, seq_len: int, model: Path, folder: Path) -> CalibrationText:
    """Cut the text of `seed` out of `source`; files go into `folder`. Imports torch."""
    import numpy as np

    from compress import calibration, tokens

    tokenizer = tokens.load_tokenizer(model)

    def length(line: str) -> int:
        if source.suffix == ".jsonl":  # documents are parted by one token
            text = json.loads(line)["text"] if line else ""
            return 1 + len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        return len(tokenizer(line + "\n", add_special_tokens=False, verbose=False).input_ids)

    lines = source.read_text(encoding="utf-8").split("\n")
    for _ in range(seed):
        lines = after(lines, samples * seq_len, length)
    text = folder / f"{source.stem}-{seed}{source.suffix}"
    text.write_text("\n".join(lines), encoding="utf-8")
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    rows = calibration.load(
        str(text), tokenizer, num_samples=samples, seq_len=seq_len, seed=0, model=model, is_reference=False,
        vocab_size=vocab_size,
    )  # fmt: skip
    if len(rows.ids_NT) < samples:
        raise SystemExit(
            f"{source} fills {len(rows.ids_NT)} rows of {seq_len} tokens for seed {seed}, not {samples}; "
            "pass fewer --samples or --seeds"
        )
    ids = folder / f"{source.stem}-{seed}.npy"
    np.save(ids, rows.ids_NT.numpy())
    return CalibrationText(text, ids, rows.sha256)


def after(lines: list[str], tokens: int, length: Callable[[str], int]) -> list[str]:
    """The lines that are left when the first ones, `tokens` tokens or a little more, are dropped."""
    dropped = 0
    for index, line in enumerate(lines):
        if dropped >= tokens:
            return lines[index:]
        dropped += length(line)
    return []
