"""Quantize, prune, distill, export and judge causal language models, one decoder block at a time.

From Python: `quantize_awq`, `quantize_int8`, `auto`, `prune_model`, `distill_model`, `run_recipe`, `evaluate`,
`export`, `load_model` (see `compress.api`). They load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.api import (
        auto,
        distill_model,
        evaluate,
        export,
        load_model,
        prune_model,
        quantize_awq,
        quantize_int8,
        run_recipe,
    )

__version__ = "0.1.0"
__all__ = [
    "__version__", "auto", "distill_model", "evaluate", "export", "load_model", "prune_model", "quantize_awq",
    "quantize_int8", "run_recipe",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in __all__:
        import importlib

        return getattr(importlib.import_module("compress.api"), name)
    raise AttributeError(f"module 'compress' has no attribute {name!r}")
