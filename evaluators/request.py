"""What an evaluation is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.errors import ConfigError
from evaluators import gate
from evaluators.windows import Bos

DEFAULT_THRESHOLD = 0.98


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What to judge. `reference` is the original; `data` a text as for calibration; `tasks` are `[NAME=]FILE.jsonl`, of
    which `limit` items each are used; ConfigError for a limit without a task.

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

    def __post_init__(self) -> None:
        check_limit(self.limit, [*self.tasks, *self.lm_eval])


def check_limit(limit: int | None, tasks: Sequence[str]) -> None:
    """ConfigError for a limit that would be left aside, as no task is asked for."""
    if limit is not None and not tasks:
        raise ConfigError(
            f"--limit {limit} counts items of tasks, and neither --tasks nor --lm-eval names one; leave it out or read "
            "less text with --max-tokens"
        )
