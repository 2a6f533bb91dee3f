"""Which models format `onnx` takes, from config.json alone, and the codes that its operator takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import UnsupportedError
from exporters.reader import Layout

# MatMulNBits takes blocks of powers of two; one scale a row is written as equal ones.
GROUP_SIZES = (128, 64, 32, 16, 256)
LAYOUT = Layout(
    num_bits=(4,),
    group_sizes=GROUP_SIZES,
    w8_group_sizes=(-1, *GROUP_SIZES),
    w8a8=("a8", "a8-asym", "a8-static", "a8-asym-static"),
)

# Built and compared with the artifact in tests/exporters/genai/test_write.py, INT4 and dense.
ARCHITECTURES = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM",
    "GemmaForCausalLM", "Gemma2ForCausalLM",
)  # fmt: skip


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for a model that the builder's graph does not compute, or not as its config says."""
    architecture = (config.get("architectures") or ["?"])[0]
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"{path}: {architecture} is not supported by onnx yet; supported are {', '.join(ARCHITECTURES)}"
        )
    kind = rope_type(config)
    if kind in ("dynamic", "longrope"):
        raise UnsupportedError(
            f"{path}: rope_type {kind!r} changes with the length of the text, beyond what the export checks; "
            "it is not supported by onnx yet"
        )


def rope_type(config: Mapping[str, Any]) -> str:
    """transformers 5's `rope_parameters`, or the `rope_scaling` of older folders."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return str(given.get("rope_type", given.get("type", "default")))
