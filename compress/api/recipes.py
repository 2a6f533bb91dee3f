"""Recipes from Python: `run_recipe`."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

from compress.api.calls import PathLike, text_of
from compress.errors import GateFailed

VERDICTS = {0: "PASS", 3: "FAIL", 4: "INCONCLUSIVE"}


@dataclass(frozen=True, kw_only=True)
class RecipeOutcome:
    """What a recipe did. steps: of each, as `compress run --json` documents them. verdict: of its gate, None without.

    exit_code: the gate's, 0 where it passed or there was none.
    """

    steps: list[dict[str, Any]]
    verdict: str | None
    exit_code: int


def run_recipe(
    recipe: PathLike,
    *,
    model: PathLike | None = None,
    settings: Mapping[str, Any] | None = None,
    force: bool = False,
) -> RecipeOutcome:
    """Run the stages of a recipe (a TOML file, or the name of a ready one) in its order, as `compress run` does.

    settings: other values than the recipe's, by `STEP.OPTION`: `{"awq.effort": "fast"}`. All steps are checked before
    the first one starts; what was made before by the same options and inputs is used as it is. A gate that does not
    pass is no error here: see the outcome. What the steps make lies in `artifacts/`, as on the command line.
    """
    from compress.cli.run import prepared

    asked = [f"{name}={json.dumps(value)}" for name, value in (settings or {}).items()]
    run = prepared(str(text_of(recipe)), asked, text_of(model), force=force, as_json=True)
    run.check()
    code = 0
    with redirect_stdout(io.StringIO()):
        try:
            run.go()
        except GateFailed as e:
            code = e.exit_code
    gated = any(step.stage == "evaluate" and "gate" in step.fields for step in run.recipe.steps)
    return RecipeOutcome(steps=run.told, verdict=VERDICTS[code] if gated else None, exit_code=code)
