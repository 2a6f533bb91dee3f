"""Options that every stage with calibration text shares, and the closing lines of what it made."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compress.cli.console import Console
from compress.cli.options import MODEL, RUN, Table, adder
from compress.cli.progress import peak_memory_bytes, seconds_text

if TYPE_CHECKING:
    from compress.workspace import Source

# Layers that the closing table shows.
SHOWN = 8
_OPTIONS: Table = {
    "calib": partial(
        click.option,
        "--calib",
        metavar="TEXT",
        help="Calibration text: a .txt, .jsonl or .parquet file, hf:DATASET[:split[:column]], or `self` (sampled from "
        "the model). Default: the bundled set for the reference model; for others `self` up to 1 GB of weights (4 GB "
        "on a GPU), larger ones need a text.",
    ),
    "samples": partial(
        click.option, "--samples", type=click.IntRange(1), default=128, show_default=True, help="Calibration rows."
    ),
    "seq_len": partial(
        click.option, "--seq-len", type=click.IntRange(1), default=512, show_default=True, help="Tokens in a row."
    ),
    "device": partial(
        click.option,
        "--device",
        default="auto",
        show_default=True,
        help="Where blocks are computed: cpu, cuda[:N]; auto: a GPU if any.",
    ),
    "dtype": partial(
        click.option,
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="Arithmetic of the calibration forward passes (auto: float32 on a CPU, bfloat16 on a GPU); searches are "
        "float32.",
    ),
    "self_samples": partial(
        click.option,
        "--self-samples",
        type=click.IntRange(0),
        help="Rows sampled from the model itself, added to the text.",
    ),
    "seed": partial(
        click.option, "--seed", type=int, default=0, show_default=True, help="Seed of sampling from the model."
    ),
    "skip": partial(
        click.option,
        "--skip",
        multiple=True,
        metavar="PATTERN",
        help="Layers to leave as they are, such as '*.down_proj'.",
    ),
    "allow_damage": partial(
        click.option,
        "--allow-damage",
        is_flag=True,
        help="Go on when a layer's output would be mostly error, and list it.",
    ),
    **MODEL,
    **RUN,
}


calibrated = adder(_OPTIONS)


def model_of(
    model: str | None, *, out: Path | None, force: bool, revision: str | None, adapter: Path | None, trust: bool
) -> Source:
    """The full-precision model that MODEL means, with the adapter in it."""
    from compress.adapter import merged
    from compress.tell import Tell
    from compress.workspace import WORKSPACE, is_model, resolve

    class Said(Tell):
        def say(self, text: str) -> None:
            print(text, file=sys.stderr)

    source = resolve(model, quantizable=True, accept=is_model, out=out, force=force, revision=revision)
    if adapter is None:
        return source
    return merged(source, adapter, WORKSPACE, trust_remote_code=trust, tell=Said())


def say_where(source: Source, device: str, dtype: str) -> None:
    """Which model, and what computes; on stderr, before any work."""
    from compress.devices import described

    print(f"model: {source.said}\ncomputed on: {described(device)}, {dtype}", file=sys.stderr)


def block_text(report: Mapping[str, Any]) -> str:
    """A finished block in a few words: its worst layer."""
    worst = max(report["layers"], key=lambda layer: layer["error"], default=None)
    if worst is None:
        return "nothing to quantize"
    return f"worst {worst['layer'].split('.')[-1]} {worst['error']:.2e} (round-to-nearest {worst['rtn_error']:.2e})"


def print_json(outcome: Any, wall_seconds: float, **seconds: float) -> None:
    """wall_seconds: of the whole command. seconds: others to report, by name."""
    value: Mapping[str, Any] = {
        "out": str(outcome.out),
        **{name: round(taken, 3) for name, taken in seconds.items()},
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


def worst_layers(
    layers: Sequence[Mapping[str, Any]], columns: Mapping[str, Callable[[Mapping[str, Any]], str]], when: str = ""
) -> Any:
    """A table of the layers that lose most, with columns of the method's own; the manifest has all layers."""
    from rich.table import Table

    worst = sorted(layers, key=lambda layer: -layer["error"])
    where = "; all are in compress.json" if len(layers) > SHOWN else ""
    table = Table(
        title=f"worst layers of {len(layers)}: squared output error over the output's own square{when}{where}",
        title_justify="left",
    )
    for column in ("layer", "error", "round-to-nearest", "of it", *columns):
        table.add_column(column, justify="left" if column == "layer" else "right", no_wrap=True)
    for layer in worst[:SHOWN]:
        table.add_row(
            layer["layer"],
            f"{layer['error']:.3e}",
            f"{layer['rtn_error']:.3e}",
            f"{layer['error'] / max(layer['rtn_error'], 1e-30):.2f}",
            *(text(layer) for text in columns.values()),
        )
    return table


def print_found(out: Console, outcome: Any) -> None:
    """What a user must know of any quantized model: groups not smoothed, layers destroyed, text that ran out, notes."""
    record = outcome.record
    unfolded = [g for g in record["groups"] if g["fold"] is None]
    if unfolded:
        names = ", ".join(sorted({g["layers"][0].rsplit(".", 1)[-1] for g in unfolded}))
        out.print(f"no smoothing for {len(unfolded)} of {len(record['groups'])} groups ({names}): see compress.json")
    if record["damaged"]:
        out.print(f"DAMAGED, as you allowed: {', '.join(record['damaged'])}", soft_wrap=True)
    filled, asked = record["calibration"]["num_samples"], record["options"]["samples"]
    if filled < asked:
        out.print(f"calibration text filled {filled} of {asked} rows; more text would be used")
    for note in outcome.notes:
        out.print(note)


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
