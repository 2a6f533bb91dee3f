"""A layer whose output is mostly error is not quantized but destroyed; the run stops and says which.

Errors are squared: 1 means an error as large as the output itself, which is what a weight of zeros makes. One weight
that drowns all others hides from that: it is most of the output, its neighbours round to zero, and the error is small.
So such a weight is looked for by itself; in files it is a damaged byte or a value clamped at its type's limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from compress.errors import ArtifactError

# INT4 loses about 0.01 of Gaussian weights at group 128; no layer of a real model was seen above 0.1.
DAMAGED = 0.5
# The largest weight over the mean of the others. SmolLM2-135M and Gemma-3-270M reach 66; the "super weights" of larger
# models (Yu et al. 2024, https://arxiv.org/abs/2411.07191) about 1,000.
DROWNING = 1e4


def relative_error(error: float, signal: float, layer: str) -> float:
    """Error power over signal power, with enough digits to be read and few enough to be stable: on a GPU the sixth
    digit of a sum over a layer was seen to differ from run to run, and a manifest must not.

    A sum that rounding left a little below zero is zero. Raises ArtifactError when either is not finite.
    """
    if not (math.isfinite(error) and math.isfinite(signal)):
        raise ArtifactError(
            f"{layer}: its output error on the calibration text is {error:g} of {signal:g}, not a number that can be "
            f"judged: its inputs or weights overflow float32; leave it as it is with --skip {layer}"
        )
    return float(f"{max(0.0, error) / max(signal, 1e-30):.4g}")


def refuse_damage(layer: str, error: float, rtn_error: float) -> None:
    """Raise ArtifactError for a layer whose relative `error` says that nothing of it is left."""
    if error >= DAMAGED:
        raise ArtifactError(
            f"{layer}: quantized, its output would be off by {error:.2g} of its own power (rounding to nearest: "
            f"{rtn_error:.2g}), so the layer would be destroyed; leave it as it is with --skip {layer}, or pass "
            "--allow-damage to go on all the same"
        )


def refuse_drowning(layer: str, w_OI: Tensor) -> None:
    """Raise ArtifactError when one weight is so large that, beside it, the others are nothing."""
    size_OI = w_OI.abs()
    largest = float(size_OI.max())
    others = (float(size_OI.sum(dtype=torch.float64)) - largest) / max(1, size_OI.numel() - 1)
    if others > 0 and largest / others > DROWNING:
        raise ArtifactError(
            f"{layer}: its largest weight, {largest:g}, is {largest / others:.0e} times the mean of the others "
            f"({others:.2g}), which looks like damage and leaves its neighbours no codes; get the file again, leave "
            f"the layer as it is with --skip {layer}, or pass --allow-damage to go on all the same"
        )


def damaged(reports: Iterable[Mapping[str, Any]]) -> list[str]:
    """The layers that `refuse_damage` would have stopped at, from the blocks' reports; for the manifest."""
    return [report["layer"] for report in reports if report["error"] >= DAMAGED]
