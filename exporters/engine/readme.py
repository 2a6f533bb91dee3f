"""How an engine is run, for the README of its folder: what it is, what loads it, what goes in and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporters.readme import FOLDER, Usage


def usage(stamp: Mapping[str, Any]) -> Usage:
    """stamp: `model.engine.json`, as `build_engine.py` writes it."""
    library, version, sm = stamp["library"], stamp["version"], stamp["sm"]
    built_on = stamp["built_on"]
    where = "compiled on a machine without one" if built_on is None else f"built on {built_on['gpu']}"
    counts = [(stamp[f"int{bits}_fused"], bits) for bits in (4, 8)]
    fused = "".join(f" Its {n} INT{bits} products are computed from INT{bits} weights." for n, bits in counts if n)
    return Usage(
        what=f"A TensorRT engine for GPUs of SM {sm}, {where}. It was built, not run.{fused}",
        verb="run it on its device",
        command=("compress", "generate", FOLDER, "Once upon a time"),
        needs=(
            f"a GPU of SM {sm}; `model.engine.json` says so, and is checked",
            f"{library} {version}, no other version: `pip install {library.replace('_', '-')}=={version}`",
            "this toolkit, with a CUDA build of torch",
        ),
        more=_contract(stamp),
    )


def _contract(stamp: Mapping[str, Any]) -> str:
    """What it prints, the profiles, inputs and outputs."""
    profiles = "\n".join(_row(name, stamp["shapes"][name]) for name in stamp["profiles"])
    first = stamp["shapes"][stamp["profiles"][0]]
    cache = next(shapes["max"] for name, shapes in first.items() if name.startswith("past_"))
    in_place = (
        "Bind each `present.N.*` to the address of its `past_key_values.N.*`: caches are updated in place."
        if stamp["caches_in_place"]
        else "Bind `present.N.*` to a second set of buffers and swap the two sets after every call."
    )
    return f"""It prints a text, and how many CUDA graph replays made it. Compare it with that of the artifact
(`parent` in `compress.json`): float16 rounds differently, so the two begin alike and may part later.

| profile | new tokens a call | sequences |
|---|---|---|
{profiles}

Inputs: `input_ids` int64 [B, T]; `write_indices` int64 [B], the tokens that each cache holds already; `logits_indices`
int64 [B, 1], which of the T to predict after; `past_key_values.N.key` and `.value` float16 {cache}. Outputs: `logits`
float16 [B, 1, vocabulary] and the caches, `present.N.*`. {in_place}

One execution context a profile, and one block of device memory for both: they never run at the same time.
"""


def _row(name: str, shapes: Mapping[str, Mapping[str, list[int]]]) -> str:
    ids = shapes["input_ids"]
    (low_b, low_t), (high_b, high_t) = ids["min"], ids["max"]
    tokens = str(low_t) if low_t == high_t else f"{low_t} to {high_t}"
    batches = str(low_b) if low_b == high_b else f"{low_b} to {high_b}"
    return f"| `{name}` | {tokens} | {batches} |"
