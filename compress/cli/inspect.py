"""`compress inspect`: what a folder holds, read from headers and manifest alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click


@click.command("inspect")
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print as one JSON object.")
def command(model: str | None, as_json: bool) -> None:
    """Show MODEL's parameters, bytes by dtype, quantization scheme, lineage and reports. Loads no weights."""
    from compress.workspace import resolve

    source = resolve(model)
    facts = describe(source.path)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    _print(facts, source.said)


def describe(path: Path) -> dict[str, Any]:
    """The facts that `compress inspect` shows, as JSON."""
    from compress.artifact import read_manifest
    from compress.checkpoint import Checkpoint
    from compress.formats import stored

    checkpoint = Checkpoint.open(path)
    folder = stored(checkpoint)
    taken = folder.taken()
    by_dtype: dict[str, int] = {}
    parameters = sum(math.prod(folder.shape(layer)) for layer in folder.layers)
    for name, info in checkpoint.tensors.items():
        by_dtype[info.dtype] = by_dtype.get(info.dtype, 0) + info.num_bytes
        if name not in taken:
            parameters += math.prod(info.shape)
    manifest = read_manifest(path)
    return {
        "path": str(path),
        "architecture": (checkpoint.config.get("architectures") or [checkpoint.config.get("model_type")])[0],
        "parameters": parameters,
        "bytes": sum(by_dtype.values()),
        "bytes_by_dtype": dict(sorted(by_dtype.items())),
        "tensors": len(checkpoint.tensors),
        "quantized_layers": len(folder.layers),
        "quantization_config": checkpoint.config.get("quantization_config"),
        "lineage": manifest.lineage if manifest else [],
        "reports": manifest.reports if manifest else [],
    }


def _print(facts: dict[str, Any], said: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("model", said)
    table.add_row("architecture", str(facts["architecture"]))
    table.add_row("parameters", f"{facts['parameters'] / 1e6:.2f} M in {facts['tensors']} tensors")
    parts = ", ".join(f"{dtype} {size / 1e6:.2f} MB" for dtype, size in facts["bytes_by_dtype"].items())
    table.add_row("weights", f"{facts['bytes'] / 1e6:.2f} MB: {parts}")
    q = facts["quantization_config"]
    if q:
        detail = ", ".join(f"{k} {v}" for k, v in q.items() if not isinstance(v, (dict, list)))
        table.add_row("quantized", f"{facts['quantized_layers']} layers, {detail}")
    else:
        table.add_row("quantized", "no")
    for depth, record in enumerate(facts["lineage"]):
        parent = record["parent"]
        text = f"{record['stage']} from {parent['path']} (sha256 {parent['sha256'][:12]})"
        calibration = record.get("calibration")
        if calibration:
            size = f"{calibration['num_samples']} x {calibration['seq_len']}"
            text += f", calibrated on {size} tokens of {calibration['source']}"
        table.add_row("made by" if depth == 0 else "before", text)
    for report in facts["reports"]:
        table.add_row("report", json.dumps(report)[:300])
    if facts["lineage"] and not facts["reports"]:
        table.add_row("reports", "none yet; run compress evaluate")
    console.print(table)
