"""How many positions a model has: the longest row that it was built to read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import ConfigError

# Names of the figure in config.json, in the order in which they are looked for; the first is today's.
_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")


def max_positions(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """The name and value of the limit that a config.json states; None where it states none (such as ALiBi models).

    A rotary table that is stretched (YaRN) reaches to its factor times the length that it was stretched from.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping):  # a model of several modalities
        config = text
    key = next((k for k in _KEYS if _is_count(config.get(k))), None)
    if key is None:
        return None
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(scaling, Mapping):
        scaling = {}
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    stretched = int(factor * original) if isinstance(factor, int | float) and isinstance(original, int) else 0
    return key, max(int(config[key]), stretched)


def positions_of(model: Path) -> tuple[str, int] | None:
    """`max_positions` of the model in a folder; None too where the folder has no config.json that can be read."""
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # whoever opens the model says what is wrong with it
    return max_positions(config) if isinstance(config, dict) else None


def refuse_longer(model: Path, num_tokens: int, flag: str) -> None:
    """ConfigError when rows of `num_tokens`, set by `flag`, are longer than the model in a folder has positions."""
    limit = positions_of(model)
    if limit is not None and num_tokens > limit[1]:
        raise ConfigError(
            f"{flag} {num_tokens} is more than {model} has positions ({limit[0]} {limit[1]} in its config.json); "
            f"pass {flag} {limit[1]} or less"
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
