"""`compress init`: a recipe of one's own from a ready one, with the model and texts put in."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import click

from compress import advice
from compress.cli.help import Command
from compress.errors import ConfigError, reason


@click.command("init", cls=Command)
@click.argument("ready", required=False)
@click.option("--model", metavar="MODEL", help="A folder or hub id [default: the bundled model].")
@click.option("--calib", metavar="TEXT", help="Calibration text: a file, hf:DATASET[:split[:column]] or `self`.")
@click.option("--data", metavar="TEXT", help="Text to judge on: a file, hf:DATASET[:split[:column]] or `self`.")
@click.option("--gate", type=click.FloatRange(0, 1), help="Least recovery to pass [default: the ready recipe's].")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="File to write [default: READY.toml].")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def command(
    ready: str | None,
    model: str | None,
    calib: str | None,
    data: str | None,
    gate: float | None,
    out: Path | None,
    force: bool,
) -> None:
    """Write a recipe to change and run, from the ready one called READY.


    On a terminal, what is not given is asked for. Without a terminal READY must be given.
    """
    from compress.files import write_bytes_atomically
    from compress.recipe import closest, parse, read_recipe, ready_recipes

    known = ready_recipes()
    asks = ready is None and sys.stdin.isatty()
    if asks:
        for name in known:
            click.echo(f"  {name:<16} {read_recipe(name).about}", err=True)
        ready = click.prompt("recipe", type=click.Choice(list(known)), default="a100-awq", err=True)
        model = model or click.prompt("model (empty: the bundled one)", default="", err=True) or None
        if model is not None:
            calib = calib or click.prompt("calibration text (empty: the default)", default="", err=True) or None
            data = data or click.prompt("text to judge on", default="self", err=True)
    if ready is None:
        raise ConfigError(f"which recipe? pass one of {', '.join(known)}")
    if ready not in known:
        meant = closest(ready, known)
        raise ConfigError(
            f"{ready} is no ready recipe{f'; did you mean {meant}?' if meant else ''}; there are {', '.join(known)}"
        )
    place = out or Path(f"{ready}.toml")
    if place.exists() and not force:
        raise ConfigError(f"{place} exists already; pass --force to replace it, or -o for another place")
    text = filled(known[ready].read_text(encoding="utf-8"), {"model": model, "calib": calib, "data": data}, gate)
    parse(text, name=place.stem, said=str(place))
    try:
        write_bytes_atomically(place, text.encode())
    except OSError as e:
        raise ConfigError(f"{place} cannot be written ({reason(e)}); pass another place with -o") from None
    click.echo(f"wrote {place}\nnext: {advice.command('run', place, '--dry-run')}")


def filled(text: str, values: dict[str, str | None], gate: float | None) -> str:
    """A ready recipe with values in the place of its commented examples, and another gate."""
    for key, value in values.items():
        if value is not None:
            line = f"{key} = {json.dumps(value, ensure_ascii=False)}"
            written = f"{line:<36}".replace("\\", "\\\\")  # a backslash of its own, not re's
            text = re.sub(rf'^# {key} = "[^"]*" *(?=#)', written, text, flags=re.M)
    if gate is not None:
        text = re.sub(r"^gate = [0-9.]+", f"gate = {gate:g}", text, flags=re.M)
    return text
