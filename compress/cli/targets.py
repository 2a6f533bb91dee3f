"""`compress targets`: the machines that an artifact can be sized for and exported to."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from compress.cli.help import Command

if TYPE_CHECKING:
    from rich.table import Table


@click.command("targets", cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print every figure with its source as one JSON object.")
def command(as_json: bool) -> None:
    """List the targets: memory, bandwidth, arithmetic, software, and the formats that their readers take.

    A format in bold type is the target's default. `compress targets --json` gives the source of every figure.
    """
    from exporters.sizing.targets import TARGETS

    if as_json:
        print(json.dumps({name: target.to_json() for name, target in TARGETS.items()}, indent=2))
        return
    from rich.console import Console

    console = Console()
    console = console if console.is_terminal else Console(width=WIDE)
    console.print(table_for(console.width))
    more = "Arithmetic" if console.width >= WIDE else "Machines, cards, arithmetic"
    console.print(
        f"- : not published, or does not apply. {more}, JetPack, TensorRT and every source: compress targets --json",
        soft_wrap=True,
    )


# Columns that the whole table takes.
WIDE = 120


def table_for(columns: int) -> Table:
    """The targets, formats on one line: without the machines' titles and cards where a terminal is narrow."""
    from rich.table import Table

    from exporters.sizing.targets import TARGETS

    wide = columns >= WIDE
    table = Table(title="Targets (GB decimal)", title_justify="left")
    table.add_column("target", no_wrap=True)
    if wide:
        table.add_column("machine")
    for column in ("memory", "usable", "GB/s", *(["SM"] if wide else [])):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("formats", no_wrap=True)
    for t in TARGETS.values():
        table.add_row(
            t.name,
            *([t.title] if wide else []),
            f"{t.memory_bytes / 1e9:g}",
            f"{t.usable_bytes / 1e9:.1f}",
            _number(t.bandwidth and t.bandwidth / 1e9),
            *([t.sm or "-"] if wide else []),
            ", ".join([f"[bold]{t.formats[0]}[/bold]", *t.formats[1:]]),
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"
