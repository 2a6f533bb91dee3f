"""`compress doctor`: what this machine can do. The checks are in `compress.doctor`."""

from __future__ import annotations

import json

import click

from compress.cli.help import Command


@click.command("doctor", cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print the checks as one JSON object.")
def command(as_json: bool) -> None:
    """Check the machine and the installation; each lack comes with the command that mends it.

    Exit code 1 when something that is there does not work. What is merely not installed is no error: it says what for.
    """
    from compress.doctor import checks

    found = list(checks())
    broken = [c for c in found if c.state == "broken"]
    if as_json:
        print(json.dumps({"ok": not broken, "checks": [c.to_json() for c in found]}, indent=2))
    else:
        width = max(len(c.name) for c in found)
        for c in found:
            click.echo(f"{_MARKS[c.state]} {c.name:<{width}}  {c.found}")
            if c.state != "ok":
                indent = " " * (width + 4)
                click.echo(f"{indent}for: {c.needed_for}" + (f"\n{indent}mend: {c.mend}" if c.mend else ""))
        absent = sum(c.state == "absent" for c in found)
        click.echo(f"{len(found) - len(broken) - absent} fine, {absent} not here, {len(broken)} broken")
    if broken:
        raise SystemExit(1)


_MARKS = {"ok": click.style("+", fg="green"), "absent": "-", "broken": click.style("!", fg="red")}
