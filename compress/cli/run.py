"""`compress run`: a recipe's steps in a row, each checked before the first, reused where nothing changed."""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compress.cli.help import Command
from compress.cli.progress import seconds_text
from compress.errors import CompressError, ConfigError, GateFailed

if TYPE_CHECKING:
    from compress.cli.recipe_steps import Planned
    from compress.cli.run_checks import Foreseen
    from compress.pipeline import Made, Runs
    from compress.recipe import Recipe


@click.command("run", cls=Command)
@click.argument("recipe")
@click.option("--model", metavar="MODEL", help="A folder or hub id, over the recipe's [default: the bundled model].")
@click.option(
    "--set", "settings", multiple=True, metavar="STEP.OPTION=VALUE", help="Another value than the recipe's; repeatable."
)
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan with sizes, and start nothing.")
@click.option("--force", is_flag=True, help="Make every step again, and replace what is in the way.")
@click.option("--json", "as_json", is_flag=True, help="Print the steps and their results as one JSON object.")
def command(
    recipe: str, model: str | None, settings: tuple[str, ...], dry_run: bool, force: bool, as_json: bool
) -> None:
    """Run the stages of RECIPE, a TOML file or the name of a ready one, in its order.


    All steps are checked before the first one starts. What they make lies in ./artifacts as RECIPE-STEP; a step with
    the same options and inputs as before is not run again, and a killed one goes on. The exit code is the gate's: 0
    PASS, 3 FAIL, 4 INCONCLUSIVE.
    """
    run = prepared(recipe, settings, model, config_is_enough=dry_run, force=force, as_json=as_json)
    if not as_json:
        about = f" ({run.recipe.about})" if run.recipe.about else ""
        print(f"recipe: {run.recipe.said}{about}\nmodel: {run.model}", file=sys.stderr)
    foreseen = run.check()
    if dry_run:
        run.print_plan(foreseen)
        return
    run.go()


def prepared(
    recipe: str,
    settings: Sequence[str],
    model: str | None,
    *,
    config_is_enough: bool = False,
    force: bool,
    as_json: bool,
) -> RecipeRun:
    """The recipe as it is to be run, its fields checked. ConfigError with the line of what is wrong."""
    from compress import distributed
    from compress.cli.recipe_steps import check_fields
    from compress.pipeline import Runs
    from compress.recipe import read_recipe, with_overrides
    from compress.workspace import WORKSPACE

    if distributed.started() > 1:
        raise ConfigError(
            f"a recipe is run by one process, and {distributed.started()} were started; start it without torchrun, "
            "or run the step that is to be shared by its own command"
        )
    asked = [*settings, *([f"model={model}"] if model is not None else [])]
    wanted = with_overrides(read_recipe(recipe), asked)
    check_fields(wanted)
    found = _model(wanted, config_is_enough=config_is_enough)
    return RecipeRun(
        recipe=wanted, model=found, runs=Runs(WORKSPACE), workspace=WORKSPACE, force=force, as_json=as_json
    )  # fmt: skip


def _model(recipe: Recipe, *, config_is_enough: bool) -> Path:
    """The recipe's model on disk; the bundled one where it names none."""
    import calibration_data
    from compress.checkpoint import Checkpoint
    from compress.workspace import config_only, resolve

    if recipe.model is None:
        return calibration_data.reference_model()
    try:
        if config_is_enough:
            return config_only(recipe.model.value)
        found = resolve(recipe.model.value).path
        Checkpoint.open(found)  # refuses a folder without weights
        return found
    except CompressError as e:
        raise ConfigError(f"{recipe.model.where}: {e}") from None


@dataclass(kw_only=True)
class RecipeRun:
    """One run of a recipe. Steps are planned anew as their folders become known."""

    recipe: Recipe
    model: Path
    runs: Runs
    workspace: Path
    force: bool
    as_json: bool

    def __post_init__(self) -> None:
        self.folder_of = {s.name: self.workspace / f"{self.recipe.name}-{s.name}" for s in self.recipe.steps}
        self.told: list[dict[str, Any]] = []

    def planned(self) -> list[Planned]:
        """The steps, as far as is known."""
        from compress.cli.recipe_steps import planned

        return list(planned(self.recipe, self.model, self.folder_of))

    # ---- before ------------------------------------------------------------------------------------------

    def check(self) -> dict[str, Foreseen]:
        """Raise, with the step's line, what any step would refuse. What each will make, by the step's name."""
        from compress.disk import check_free_space

        steps = self.planned()
        done = self._done(steps)
        for planned in steps:
            if planned.step.name not in done:
                with _named(planned):
                    self._check_place(planned)
        found = self._foresee(steps, self.model)
        needed = sum(f.bytes or 0 for name, f in found.items() if name not in done)
        largest = max((f.bytes or 0 for f in found.values()), default=0)
        check_free_space(self.workspace, needed + largest)
        return found

    def _check_place(self, planned: Planned) -> None:
        """What is in the way of a step's folder must be ours."""
        from compress import output

        ours = self.force or self.runs.is_ours(planned.out, planned.step.stage)
        if planned.step.stage != "evaluate":
            output.check(planned.out, {"the model": self.model}, force=ours)

    def _foresee(self, steps: list[Planned], at: Path) -> dict[str, Foreseen]:
        """What the steps make of the model in `at`, or the error of the first that would refuse it."""
        from compress import foreseen as stand_in
        from compress.artifact import MANIFEST
        from compress.cli.run_checks import foresee
        from compress.files import is_file, read_json
        from compress.weights import holds_safetensors

        found: dict[str, Foreseen] = {}
        with tempfile.TemporaryDirectory(prefix="compress-plan-") as scratch:
            if not holds_safetensors(at):
                stand_in.dense(Path(scratch, "model"), at, read_json(at / "config.json"), "model")
                at = Path(scratch, "model")
            for planned in steps:
                folder = Path(scratch, planned.out.name)
                takes = self.model if planned.step.stage == "teach" else at
                with _named(planned, scratch, str(self.workspace)):
                    found[planned.step.name] = foresee(planned, takes, folder)
                if is_file(folder / MANIFEST):
                    at = folder
        return found

    def _done(self, steps: list[Planned]) -> dict[str, Made]:
        """The steps, from the first on, that were made before and are unchanged."""
        done: dict[str, Made] = {}
        for index in range(len(steps)):
            planned = self.planned()[index]
            entry = None if self.force else self.runs.find(self._key(planned))
            if entry is None:
                break
            done[planned.step.name] = entry
            self.folder_of[planned.step.name] = self.workspace / entry.out
        return done

    def _key(self, planned: Planned) -> str:
        from compress.cli.recipe_steps import TAKES
        from compress.pipeline import key_of

        taking = TAKES[planned.step.stage]
        own = {"out", "force", "resume", "as_json", "dry_run", taking}
        if planned.step.stage == "evaluate" and "report" not in planned.step.fields:
            own.add("report")
        params = {name: value for name, value in planned.params.items() if name not in own}
        taken = Path(planned.params[taking]) if planned.params.get(taking) else planned.takes
        return key_of(planned.step.stage, params, taken)

    # ---- the plan ----------------------------------------------------------------------------------------

    def print_plan(self, foreseen: Mapping[str, Foreseen]) -> None:
        """The steps, what they will make, how large, and the commands that do the same."""
        steps = self.planned()
        done = self._done(steps)
        rows = []
        for planned in self.planned():
            name, found = planned.step.name, foreseen[planned.step.name]
            rows.append({
                "step": name,
                "stage": planned.step.stage,
                "state": "made before" if name in done else "to do",
                "out": str(planned.out),
                "bytes": found.bytes,
                "memory_bytes": found.memory,
                "seconds_before": self.runs.seconds(self.recipe.name, name),
                "note": found.note,
                "command": planned.line,
            })  # fmt: skip
        if self.as_json:
            print(json.dumps({"recipe": self.recipe.said, "model": str(self.model), "plan": rows}, indent=2))
            return
        _print_plan(rows)

    # ---- the run -----------------------------------------------------------------------------------------

    def go(self) -> None:
        """Run what is not made yet. Raises GateFailed as the gate says, after everything was told."""
        failed: GateFailed | None = None
        for index, step in enumerate(self.recipe.steps):
            planned = self.planned()[index]
            key = self._key(planned)
            entry = None if self.force else self.runs.find(key)
            state, result = "made before", None
            if entry is None:
                entry, result = self._make(planned, key)
                state = "made"
                if step.stage == "prune":
                    self._foresee(self.planned()[index + 1 :], planned.out)  # its shape is known only now
            elif not self.as_json:
                print(f"[{step.name}] unchanged: {self.workspace / entry.out}/ is used as it is", file=sys.stderr)
            self.folder_of[step.name] = self.workspace / entry.out
            self._tell(step.name, entry, state, result)
            if entry.exit_code:
                failed = GateFailed(entry.said, entry.exit_code)
                break
        self._print_end(failed)
        if failed is not None:
            raise failed

    def _make(self, planned: Planned, key: str) -> tuple[Made, Any]:
        """Run one step as its command does, and keep that it is done; with `--json`, what it printed."""
        from compress.cli.recipe_steps import command_of
        from compress.pipeline import Made, hash_of

        stage, out = planned.step.stage, planned.out
        args = list(planned.args)
        if stage != "evaluate" and out.exists() and (self.force or self.runs.is_ours(out, stage)):
            args.append("--force")
        if self.as_json:
            args.append("--json")
        print(f"[{planned.step.name}] {planned.line}", file=sys.stderr)
        self.runs.begin(out, key)
        started = time.monotonic()
        code, said, printed = 0, "", io.StringIO()
        command = command_of(stage)
        with redirect_stdout(printed if self.as_json else sys.stdout):
            try:
                with command.make_context(stage, args) as context:
                    command.invoke(context)
            except GateFailed as e:
                code, said = e.exit_code, str(e)
        report = Path(planned.params["report"]) if stage == "evaluate" else out
        entry = Made(
            recipe=self.recipe.name,
            step=planned.step.name,
            stage=stage,
            out=out.name,
            made=hash_of(report) or "",
            seconds=round(time.monotonic() - started, 3),
            exit_code=code,
            said=said,
        )
        self.runs.finish(key, entry)
        return entry, json.loads(printed.getvalue()) if self.as_json else None

    def _tell(self, name: str, entry: Made, state: str, result: Any) -> None:
        self.told.append({
            "step": name,
            "stage": entry.stage,
            "state": state,
            "out": str(self.workspace / entry.out),
            "seconds": entry.seconds,
            "exit_code": entry.exit_code,
            "said": entry.said,
            "result": result,
        })  # fmt: skip

    def _print_end(self, failed: GateFailed | None) -> None:
        gated = any(s.stage == "evaluate" and "gate" in s.fields for s in self.recipe.steps)
        verdict = None if not gated else "PASS" if failed is None else {3: "FAIL", 4: "INCONCLUSIVE"}[failed.exit_code]
        if self.as_json:
            code = failed.exit_code if failed else 0
            value = {"recipe": self.recipe.said, "model": str(self.model), "steps": self.told, "verdict": verdict}
            print(json.dumps({**value, "exit_code": code}, indent=2))
            return
        made = [t for t in self.told if t["state"] == "made"]
        seconds = sum(t["seconds"] for t in made)
        last = next((t["out"] for t in reversed(self.told) if t["stage"] != "evaluate"), str(self.model))
        print(
            f"{self.recipe.name}: {len(made)} steps made in {seconds_text(seconds)}, {len(self.told) - len(made)} used "
            f"as they were; {last}/{f'; the gate says {verdict}' if verdict else ''}"
        )


class _named:
    """An error inside is said with the step and its line. scratch: a folder that messages call `instead`."""

    def __init__(self, planned: Planned, scratch: str = "\0", instead: str = "") -> None:
        self.planned, self.scratch, self.instead = planned, scratch, instead

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, tb: Any) -> None:
        if isinstance(error, CompressError):
            step = self.planned.step
            said = str(error).replace(self.scratch, self.instead)
            how = f"; options of a step: --set {step.name}.OPTION=VALUE" if " --" in said else ""
            raise ConfigError(f"{step.where}: [{step.name}] would be refused: {said}{how}") from error


def _print_plan(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from compress.cli.calibrated import console

    table = Table(title="Plan (sizes predicted from config and headers)", title_justify="left")
    for column in ("step", "state", "makes", "MB", "memory, GB", "took before"):
        table.add_column(column, justify="left" if column in ("step", "state", "makes") else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["step"],
            row["state"],
            row["out"],
            "-" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f}",
            "-" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 1e9:.2f}",
            "-" if row["seconds_before"] is None else seconds_text(row["seconds_before"]),
        )
    out = console()
    out.print(table)
    for row in rows:
        if row["note"]:
            out.print(f"[{row['step']}] {row['note']}", soft_wrap=True)
    for row in rows:
        out.print(row["command"], soft_wrap=True)
