"""What a recipe may say, from the commands' own options: no list of them is kept here.

A field is an option's long name without the dashes; `sym = false` is `--asym`. What places, forces or resumes a step is
the run's business and no field.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from compress.errors import CompressError, ConfigError
from compress.recipe import Field, Recipe, Step, closest

# Parameters that the run sets itself.
_RUNS_OWN = frozenset({"out", "force", "resume", "as_json", "dry_run"})
# `@awq` in a field: the folder that step `awq` makes; `@model`: the model.
_REFERENCE = "@"
# Where a stage takes the model that the steps before it made.
TAKES = {
    "prune": "model", "teach": "teacher", "distill": "student", "awq": "model", "int8": "model", "auto": "model",
    "export": "artifact",
    "evaluate": "candidate",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A step whose options are known to be good. out: the folder that it makes (for `evaluate`, its reports).

    args: the command's arguments. params: as its function gets them, with `takes` and `out` in them.
    """

    step: Step
    takes: Path
    out: Path
    args: list[str]
    params: Mapping[str, Any]

    @property
    def line(self) -> str:
        """The command that does the same."""
        from compress import advice

        return advice.command(self.step.stage, *self.args)


def command_of(stage: str) -> click.Command:
    """The stage's command."""
    found: click.Command = importlib.import_module(f"compress.cli.{stage}").command
    return found


def options_of(command: click.Command) -> dict[str, click.Option]:
    """The options that a recipe may set, by their fields' names."""
    return {
        _name(o): o for o in command.params if isinstance(o, click.Option) and o.name not in _RUNS_OWN and o.opts
    }  # fmt: skip


def _name(option: click.Option) -> str:
    return next((o for o in option.opts if o.startswith("--")), option.opts[0]).lstrip("-")


def check_fields(recipe: Recipe) -> None:
    """ConfigError, with the line and what was meant, for the first field that no command takes, or not so."""
    for step in recipe.steps:
        command = command_of(step.stage)
        for key, field in step.fields.items():
            _tokens(step, key, field, command)
        missing = [
            name for name, o in options_of(command).items() if o.required and name not in step.fields
        ]  # fmt: skip
        if missing:
            raise ConfigError(
                f"{step.where}: [{step.name}] has no {missing[0]}; add one, such as {_EXAMPLES[missing[0]]}"
            )


_EXAMPLES = {"target": 'target = "orin"'}


def planned(recipe: Recipe, model: Path, folder_of: Mapping[str, Path]) -> Iterator[Planned]:
    """The steps in order. model: on disk. folder_of: where each step's folder lies, or will."""
    made, last = model, model
    for step in recipe.steps:
        command = command_of(step.stage)
        takes = last if step.stage == "evaluate" else model if step.stage == "teach" else made
        args = _args(step, command, takes, folder_of, model)
        with _blamed(step):
            context = command.make_context(step.stage, list(args), resilient_parsing=False)
        out = folder_of[step.name]
        params = dict(context.params)
        yield Planned(step=step, takes=takes, out=out, args=args, params=params)
        out = folder_of[step.name]  # where an earlier run made it, if the caller found that
        if step.stage not in ("teach", "evaluate"):
            last = out
        if step.stage not in ("teach", "evaluate", "export"):
            made = out


def _args(
    step: Step, command: click.Command, takes: Path, folder_of: Mapping[str, Path], model: Path
) -> list[str]:  # fmt: skip
    taking = TAKES[step.stage]
    is_argument = any(isinstance(p, click.Argument) and p.name == taking for p in command.params)
    args = [str(takes)] if is_argument else [] if taking in step.fields else [f"--{taking}", str(takes)]
    for key, field in step.fields.items():
        args += [_resolved(step, field, token, folder_of, model) for token in _tokens(step, key, field, command)]
    if step.stage == "evaluate":
        return args if "report" in step.fields else [*args, "--report", str(folder_of[step.name])]
    return [*args, "--out", str(folder_of[step.name])]


def _resolved(step: Step, field: Field, token: str, folder_of: Mapping[str, Path], model: Path) -> str:
    if not token.startswith(_REFERENCE):
        return token
    name = token.removeprefix(_REFERENCE)
    before = [*folder_of][: [*folder_of].index(step.name)]
    if name == "model":
        return str(model)
    if name not in before:
        known = ", ".join(f"{_REFERENCE}{n}" for n in ("model", *before))
        raise ConfigError(f"{field.where}: {token} is no step before [{step.name}]; there are {known}")
    return str(folder_of[name])


def _tokens(step: Step, key: str, field: Field, command: click.Command) -> list[str]:
    """What the command line would be given for a field. ConfigError when the command has no such option, or value."""
    options = options_of(command)
    option = options.get(key)
    where = f"{field.where}: [{step.name}] {key}"
    if option is None:
        raise ConfigError(f"{where} {_unknown(key, step.stage, options)}")
    value = field.value
    if option.is_flag or option.secondary_opts:
        if not isinstance(value, bool):
            raise ConfigError(f"{where} is {value!r}; it is on or off, so write true or false")
        return [option.opts[0]] if value else option.secondary_opts[:1]
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) and not option.multiple:
        raise ConfigError(f"{where} takes one value and is given a list; write it without brackets")
    if any(not isinstance(v, str | int | float) or isinstance(v, bool) for v in values):
        raise ConfigError(f"{where} is {value!r}; write a text or a number")
    texts = [str(v) for v in values]
    try:
        context = click.Context(command, info_name=step.stage)
        option.process_value(context, texts if option.multiple else texts[0])
    except click.BadParameter as e:
        raise ConfigError(
            f"{where} is {value!r}: {e.message.rstrip('.')}; `compress {step.stage} --help` says more"
        ) from None
    except CompressError as e:
        raise ConfigError(f"{where}: {e}") from None
    return [part for text in texts for part in (option.opts[0], text)]


def _unknown(key: str, stage: str, options: Mapping[str, click.Option]) -> str:
    other = next((n for n, o in options.items() if f"--{key}" in o.secondary_opts), None)
    if other is not None:
        return f"is written as {other} = false"
    meant = closest(key.replace("_", "-"), options)
    said = f"; did you mean {meant}?" if meant else f"; `compress {stage} --help` lists them"
    if command_owned(stage, key):
        return "is set by the run itself; leave it out"
    return f"is no option of compress {stage}{said}"


def command_owned(stage: str, key: str) -> bool:
    """Whether a field's name is that of an option which the run sets."""
    names = {
        o.lstrip("-") for p in command_of(stage).params if p.name in _RUNS_OWN for o in (*p.opts, *p.secondary_opts)
    }
    return key in names


class _blamed:
    """Whatever is wrong with a step as a whole is said with its line."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, tb: Any) -> None:
        if isinstance(error, click.UsageError):
            said = error.format_message().rstrip(".")
            raise ConfigError(
                f"{self.step.where}: [{self.step.name}] {said}; `compress {self.step.stage} --help`"
            ) from None
