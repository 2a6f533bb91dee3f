"""What an evaluation is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from evaluators import gate
from evaluators.windows import Bos

DEFAULT_THRESHOLD = 0.98


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What to judge. `reference` is the original; `data` a text as for calibration; `tasks` are `[NAME=]FILE.jsonl`.

    asked: the folder that was named, where `candidate` is judged in its place (an engine's graph runs on its device).
    threshold None: measure and report, no verdict. cache_folder None: nothing is cached. kv_cache: how the candidate's
    keys and values are held, `int8` or `none` (as floats); None: as its folder says.
    """

    candidate: Path
    reference: Path
    data: str
    tasks: tuple[str, ...] = ()
    lm_eval: tuple[str, ...] = ()
    limit: int | None = None
    threshold: float | None = None
    rule: gate.Rule = "bounds"
    confidence: float = 0.95
    context: int = 512
    stride: int | None = None
    min_context: int | None = None
    bos: Bos = "auto"
    max_tokens: int = 102_400
    device: str = "cpu"
    dtype: str = "float32"
    cache_folder: Path | None = None
    kv_cache: str | None = None
    asked: Path | None = None
