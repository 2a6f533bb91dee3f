"""Options that every stage with calibration text shares, and the closing lines of what it made."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from compress.cli.console import Console
from compress.cli.progress import peak_memory_bytes, seconds_text

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--calib",
        metavar="TEXT",
        help="Calibration text: a .txt, .jsonl or .parquet file, hf:DATASET[:split[:column]], or `self` (sampled from "
        "the model). Default: the bundled set for the reference model.",
    ),
    click.option("--samples", type=click.IntRange(1), default=128, show_default=True, help="Calibration rows."),
    click.option("--seq-len", type=click.IntRange(1), default=512, show_default=True, help="Tokens in a row."),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        help="Where blocks are computed: cpu, cuda[:N]; auto: a GPU if any.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="Arithmetic of the calibration forward passes (auto: float32 on a CPU, bfloat16 on a GPU); searches are "
        "float32.",
    ),
    click.option(
        "--self-samples",
        type=click.IntRange(0),
        help="Rows sampled from the model itself, added to the text.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of sampling from the model."),
    click.option(
        "--skip", multiple=True, metavar="PATTERN", help="Layers to leave as they are, such as '*.down_proj'."
    ),
    click.option(
        "--allow-damage", is_flag=True, help="Go on when a layer's output would be mostly error, and list it."
    ),
    click.option("--force", is_flag=True, help="Replace OUT if it exists."),
    click.option("--resume/--no-resume", default=True, show_default=True, help="Go on with a run that was killed."),
    click.option("--trust-remote-code", is_flag=True, help="Run the Python code that the model's folder ships."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object."),
)


def calibrated(command: F) -> F:
    """Add the shared options to a click command's function."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def print_json(outcome: Any, seconds: float, wall_seconds: float) -> None:
    """seconds: from the model and text being ready to the verified artifact; wall_seconds: of the whole command."""
    value: Mapping[str, Any] = {
        "out": str(outcome.out),
        "seconds": round(seconds, 3),
        "wall_seconds": round(wall_seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "source_bytes": outcome.source_bytes,
        "out_bytes": outcome.out_bytes,
        "tensors_verified": outcome.verified,
        "blocks_resumed": outcome.resumed,
        "notes": outcome.notes,
        "record": outcome.record,
    }
    print(json.dumps(value, indent=2))


def console() -> Console:
    """For results, on stdout; wide enough for the tables where that is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 120)


def print_rows_used(out: Console, record: Mapping[str, Any]) -> None:
    """Says so when the text filled fewer calibration rows than were asked for."""
    filled, asked = record["calibration"]["num_samples"], record["options"]["samples"]
    if filled < asked:
        out.print(f"calibration text filled {filled} of {asked} rows; more text would be used")


def print_written(out: Console, outcome: Any, seconds: float, label: str, left: list[str]) -> None:
    """The artifact, its size before and after, what was left as it is, and that it was verified."""
    size, before, folder = outcome.out_bytes, outcome.source_bytes, Path(outcome.out)
    names = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
    out.print(
        f"wrote {folder}/  {size / 1e6:.1f} MB (was {before / 1e6:.1f} MB)  {label}, "
        f"{len(outcome.record['layers'])} layers; left as it is: {names or 'nothing'}",
        soft_wrap=True,
    )
    out.print(
        f"verified {outcome.verified} tensors by reading them back; {seconds_text(seconds)}, "
        f"peak memory {peak_memory_bytes() / 2**20:.0f} MiB",
        soft_wrap=True,
    )
