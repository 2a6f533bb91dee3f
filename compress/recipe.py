"""A recipe: stages in a row with their options, as a TOML file; where each field stands, for messages about it.

    about = "INT4 weights for an A100"
    model = "org/name"            # without: the bundled reference model

    [awq]                         # a table is a step, called after its stage; another name says `stage = "awq"`
    group-size = 64               # options as the command spells them, without the dashes

    [evaluate]
    gate = 0.98

Which options a stage has is not known here: `compress.cli.recipe_steps` asks the commands.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.errors import ConfigError, reason

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STAGES = ("prune", "teach", "distill", "awq", "int8", "auto", "export", "evaluate")
# A recipe is written by hand.
MOST_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
READY = Path(__file__).resolve().parent / "recipes"


@dataclass(frozen=True, kw_only=True)
class Field:
    """A value as TOML gives it, and where it stands: `recipe.toml line 7`, or the `--set` that it comes from."""

    value: Any
    where: str


@dataclass(frozen=True, kw_only=True)
class Step:
    """One stage of a recipe. fields: its options, by their names without dashes in front."""

    name: str
    stage: str
    where: str
    fields: Mapping[str, Field]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """name: of the file, without its ending; what the run makes is called after it. model None: the bundled one."""

    name: str
    said: str
    about: str
    model: Field | None
    steps: tuple[Step, ...]


def ready_recipes() -> dict[str, Path]:
    """The recipes that the package brings, by name."""
    return {path.stem: path for path in sorted(READY.glob("*.toml"))}


def read_recipe(named: str) -> Recipe:
    """The recipe in a file, or the ready one of that name. ConfigError names the line of what is wrong."""
    path = Path(named)
    ready = ready_recipes()
    if not path.is_file() and named in ready:
        path = ready[named]
    if not path.is_file():
        meant = closest(named, ready)
        raise ConfigError(
            f"{named}: no such recipe file{f', did you mean {meant}' if meant else ''}; ready ones are "
            f"{', '.join(ready)}, and `compress init` writes one"
        )
    if path.stat().st_size > MOST_BYTES:
        raise ConfigError(f"{named} has {path.stat().st_size} bytes, too many for a recipe; pass a recipe file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{named} cannot be read ({reason(e)}); write it as UTF-8 text") from None
    if not _NAME.fullmatch(path.stem):
        raise ConfigError(
            f"{named}: artifacts are called after a recipe's file, and {path.stem!r} is no name for them; rename it"
        )
    return parse(text, name=path.stem, said=named)


def parse(text: str, *, name: str, said: str) -> Recipe:
    """See `read_recipe`; `said` is what messages call the text."""
    text = text.replace("\r\n", "\n")
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise ConfigError(f"{said} is not TOML: {reason(e)}; mend that line") from None
    lines = _lines(text)

    def where(*path: str) -> str:
        return f"{said} line {lines.get(path, lines.get(path[:1], 1))}"

    about, model = table.pop("about", ""), table.pop("model", None)
    if not isinstance(about, str):
        raise ConfigError(f"{where('about')}: about is {about!r} and not a text; put it in quotes")
    if model is not None and not isinstance(model, str):
        raise ConfigError(f"{where('model')}: model is {model!r} and not a text; name a folder or hub id in quotes")
    steps = tuple(_step(key, value, where) for key, value in table.items())
    if not steps:
        raise ConfigError(f"{said} has no step; add one, such as [awq]")
    return Recipe(
        name=name,
        said=said,
        about=about,
        model=None if model is None else Field(value=model, where=where("model")),
        steps=steps,
    )


def _step(name: str, value: Any, where: Any) -> Step:
    if not isinstance(value, dict):
        known = ("about", "model", *STAGES)
        meant = closest(name, known)
        raise ConfigError(
            f"{where(name)}: {name} is no field of a recipe{f'; did you mean {meant}?' if meant else ''}; beside steps "
            "there are about and model, and options stand below their step, such as [awq]"
        )
    fields = dict(value)
    stage = fields.pop("stage", name)
    if stage not in STAGES:
        meant = closest(str(stage), STAGES)
        raise ConfigError(
            f"{where(name, 'stage')}: {stage} is no stage{f'; did you mean {meant}?' if meant else ''}; there are "
            f'{", ".join(STAGES)}, and a step of another name says which it is with stage = "awq"'
        )
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where(name)}: a folder is called after step {name!r}, which is no name for it; rename it")
    found = {key: Field(value=field, where=where(name, key)) for key, field in fields.items()}
    return Step(name=name, stage=str(stage), where=where(name), fields=found)


def with_overrides(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """The recipe with `STEP.OPTION=VALUE`, or `model=VALUE`, set over what it says. Values are TOML, or plain text."""
    for setting in settings:
        where = f"--set {setting}"
        key, equals, text = setting.partition("=")
        step_name, dot, option = key.strip().partition(".")
        if not equals or (not dot and step_name != "model"):
            raise ConfigError(f"{where}: is not STEP.OPTION=VALUE; write it as --set awq.samples=64")
        field = Field(value=_value(text.strip()), where=where)
        if not dot:
            recipe = replace(recipe, model=Field(value=str(text.strip()), where=where))
            continue
        names = [step.name for step in recipe.steps]
        if step_name not in names:
            meant = closest(step_name, names)
            raise ConfigError(
                f"{where}: {recipe.said} has no step {step_name}{f'; did you mean {meant}?' if meant else ''}; it has "
                f"{', '.join(names)}"
            )
        steps = (
            replace(s, fields={**s.fields, option: field}) if s.name == step_name else s for s in recipe.steps
        )  # fmt: skip
        recipe = replace(recipe, steps=tuple(steps))
    return recipe


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


def closest(word: str, known: Iterable[str]) -> str | None:
    """What was meant by a word that is not among those known, if one is like it."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def _lines(text: str) -> dict[tuple[str, ...], int]:
    """The line of each table and key, by its path. TOML's own parser says where each statement ends."""
    found: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    for line, source, value in _statements(text):
        if source.lstrip().startswith("["):
            table = _path(value)
            found.setdefault(table, line)
        elif value:
            found.setdefault((*table, *_path(value)), line)
            found.setdefault((*table, *_path(value)[:1]), line)
    return found


def _statements(text: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    lines = text.split("\n")
    start = 0
    while start < len(lines):
        end = start + 1
        while end < len(lines):
            try:
                tomllib.loads("\n".join(lines[start:end]))
                break
            except tomllib.TOMLDecodeError:
                end += 1
        source = "\n".join(lines[start:end])
        yield start + 1, source, tomllib.loads(source)
        start = end


def _path(value: Any) -> tuple[str, ...]:
    """The keys down to what one statement sets."""
    path: list[str] = []
    while isinstance(value, dict) and len(value) == 1:
        key, value = next(iter(value.items()))
        path.append(str(key))
        if len(path) == 2:
            break
    return tuple(path)
