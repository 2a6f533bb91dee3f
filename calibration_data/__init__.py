"""The bundled reference model and texts sampled from it. Imports nothing of ours, and no library."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent

PROVENANCE = _HERE / "provenance.json"
"""JSON: what each bundled file is, how it was made, its licence and its sha256."""


def reference_model() -> Path:
    """Folder of the reference model: an 11.0 M parameter Llama, float16, with its tokenizer."""
    return _HERE / "reference_lm"


def default_calibration() -> Path:
    """JSONL file of text sampled from the reference model, one {"text": ...} a line.

    It fills 128 x 512 tokens of the reference tokenizer, with about 3 % to spare.
    """
    return _HERE / "self_sampled.jsonl"


def default_evaluation() -> Path:
    """JSONL file of held-out text sampled from the reference model with other noise: 26 rows of 1024 tokens.

    Its perplexity says how far a compressed model has moved from the original, and nothing about the world.
    """
    return _HERE / "held_out.jsonl"
