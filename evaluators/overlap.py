"""No verdict on the text that a candidate was calibrated on: what its manifests keep of that text finds it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress import tokens
from compress.artifact import read_manifest
from compress.errors import ConfigError
from compress.passages import Passages
from evaluators.windows import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARED_AT_MOST = 0.01
"""The share of a text's passages that may stand in the calibration text too (quotations, licences, set phrases)."""


def refuse_calibration_text(candidate: Path, windows: Windows, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """ConfigError when the windows' text, or more than a hundredth of it, was calibrated on.

    That is so when one of the candidate's manifests, its ancestors' included, records the same text, the same file
    (however much was read of it), or passages that stand in the windows, wherever they begin. Returns
    notes on shares that are too small to matter.
    """
    manifest = read_manifest(candidate)
    used = _texts(manifest.lineage if manifest else [])
    return refuse_used(used, windows, tokenizer, f"{candidate} was calibrated on")


def refuse_used(
    texts: Sequence[Mapping[str, Any]], windows: Windows, tokenizer: PreTrainedTokenizerBase, said: str
) -> list[str]:
    """See `refuse_calibration_text`. texts: what manifests keep of them. said: what they were for, in words."""
    text = tokens.text_of(tokenizer, torch.cat([s.ids_T for s in windows.sequences]))
    notes = []
    for used in texts:
        if {windows.text_sha256, windows.source_sha256} & (
            {used.get("text_sha256"), used.get("source_sha256")} - {None}
        ):
            raise ConfigError(f"{windows.source} is the text that {said}; pass other text with --data")
        kept = Passages.from_json(used.get("passages"))
        found, told = kept.found_in(text) if kept else (0, 0)
        if found > told * SHARED_AT_MOST:
            raise ConfigError(
                f"{found / told:.1%} of {windows.source} is text that {said} "
                f"({used.get('source')}); pass other text with --data"
            )
        if found:
            notes.append(
                f"{found / told:.2%} of {windows.source} is text that was calibrated on ({used.get('source')})"
            )
    return notes


def _texts(lineage: list[dict[str, Any]]) -> list[Mapping[str, Any]]:
    """What each stage records of a text that it learned from, under whatever name; several stand under `sources`."""
    told = [v for record in lineage for v in record.values() if isinstance(v, Mapping)]
    told += [source for v in told for source in v.get("sources", []) if isinstance(source, Mapping)]
    told += [v["watched"] for v in told if isinstance(v.get("watched"), Mapping)]
    return [v for v in told if "text_sha256" in v]
