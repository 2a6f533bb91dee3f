"""A layer whose output is mostly error is not quantized but destroyed; the run stops and says which.

Errors are squared: 1 means an error as large as the output itself, which is what a weight of zeros makes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from compress.errors import ArtifactError

# INT4 loses about 0.01 of Gaussian weights at group 128; no layer of a real model was seen above 0.1.
DAMAGED = 0.5


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


def damaged(reports: Iterable[Mapping[str, Any]]) -> list[str]:
    """The layers that `refuse_damage` would have stopped at, from the blocks' reports; for the manifest."""
    return [report["layer"] for report in reports if report["error"] >= DAMAGED]
