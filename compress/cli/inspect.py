"""`compress inspect`: what a folder holds, read from headers and manifest alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from compress.cli.help import Command
from compress.errors import ArtifactError, UnsupportedError

MANIFEST = "compress.json"


@click.command("inspect", cls=Command)
@click.argument("model", required=False)
@click.option("--verify", is_flag=True, help="Read every file and compare it with the hash in compress.json.")
@click.option("--json", "as_json", is_flag=True, help="Print as one JSON object.")
def command(model: str | None, verify: bool, as_json: bool) -> None:
    """Show MODEL's parameters, bytes by dtype, quantization scheme, lineage and reports. Loads no weights.

    Names and shapes of all tensors are compared with what config.json describes. With --verify the exit code is 1
    unless every file is as it was published.
    """
    from compress.workspace import resolve

    source = resolve(model)
    compared = _compared(source.path) if verify else None
    if compared is not None and not as_json:
        _print_compared(compared, source.path)
    facts = describe(source.path) if compared is None or compared["whole"] else {"path": str(source.path)}
    if as_json:
        print(json.dumps({**facts, "verified": compared} if verify else facts, indent=2))
    elif len(facts) > 1:
        _print(facts, source.said)
    if compared is not None and not compared["whole"]:
        raise ArtifactError(f"{source.path} is not as it was published; fetch or make the artifact again")


def _compared(path: Path) -> dict[str, Any]:
    from compress.artifact import read_manifest
    from compress.contents import compare_files, is_read

    manifest = read_manifest(path)
    if manifest is None or manifest.files is None:
        lacks = f"no {MANIFEST}" if manifest is None else f"a {MANIFEST} of an older version, without hashes"
        raise ArtifactError(f"{path} has {lacks}, so there is nothing to compare its files with")
    found = compare_files(path)
    added = [name for name in found.added if "/" not in name and is_read(name)]
    return {
        "files": len(manifest.files),
        "bytes": sum((path / name).stat().st_size for name in found.hashes),
        "gone": found.gone,
        "changed": found.changed,
        "added": added,
        "beside": [name for name in found.added if name not in added],
        "whole": not (found.gone or found.changed or added),
    }


def _print_compared(compared: dict[str, Any], path: Path) -> None:
    said = {"gone": "is gone", "changed": "is not what was published", "added": "was added and would be read"}
    for key, text in {**said, "beside": "is not the artifact's"}.items():
        for name in compared[key]:
            print(f"{path / name} {text}")
    if compared["whole"]:
        print(f"verified {compared['files']} files, {compared['bytes'] / 1e6:.2f} MB: all as they were published")


def describe(path: Path) -> dict[str, Any]:
    """The facts that `compress inspect` shows, as JSON."""
    from compress.artifact import read_manifest
    from compress.checkpoint import Checkpoint
    from compress.formats import stored
    from evaluators.memory import recalled

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
        "not_streamed": _not_streamed(path),
        "quantized_layers": len(folder.layers),
        "quantization_config": checkpoint.config.get("quantization_config"),
        "lineage": manifest.lineage if manifest else [],
        "reports": recalled(path),
    }


def _not_streamed(path: Path) -> str | None:
    """Why the other commands cannot take this folder, sound as it may be; None when they can. Damage is an error."""
    from compress.model import StreamedModel

    try:
        StreamedModel.open(path)
    except UnsupportedError as e:
        return str(e).removeprefix(f"{path}: ")
    return None


def _print(facts: dict[str, Any], said: str) -> None:
    from rich.table import Table
    from rich.text import Text

    from compress.cli.console import Console

    console = Console()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("model", said)
    table.add_row("architecture", str(facts["architecture"]))
    table.add_row("parameters", f"{facts['parameters'] / 1e6:.2f} M in {facts['tensors']} tensors")
    parts = ", ".join(f"{dtype} {size / 1e6:.2f} MB" for dtype, size in facts["bytes_by_dtype"].items())
    table.add_row("weights", f"{facts['bytes'] / 1e6:.2f} MB: {parts}")
    if facts["not_streamed"]:
        table.add_row("not taken", Text(facts["not_streamed"]))
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
