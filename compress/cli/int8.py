"""`compress int8`: options, progress and the closing summary. The work is in `compress.quantize.int8_stage`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from compress.cli.calibrated import (
    block_text,
    calibrated,
    console,
    model_of,
    print_found,
    print_json,
    print_written,
    say_where,
    worst_layers,
)
from compress.cli.help import Command
from compress.cli.next import judge
from compress.cli.progress import Shown


def _strength(_: click.Context, option: click.Parameter, value: str) -> float | None:
    """`auto` is None; anything else must be a number, whose bounds the request checks."""
    if value == "auto":
        return None
    try:
        return float(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither `auto` nor a number from 0 to 1", param=option) from None


def _kept(_: click.Context, option: click.Parameter, value: str) -> int | None:
    """`auto` is None."""
    if value == "auto":
        return None
    if not value.isdecimal():
        raise click.BadParameter(f"{value!r} is neither `auto` nor a number of groups", param=option)
    return int(value)


@click.command("int8", cls=Command)
@click.argument("model", required=False)
@click.option(
    "--scheme",
    type=click.Choice(["w8a8", "w8a16"]),
    default="w8a8",
    show_default=True,
    help="w8a8: weights and inputs as integers (A100, Orin, CPUs); w8a16: weights only.",
)
@click.option(
    "--smoothing",
    default="auto",
    show_default=True,
    metavar="auto|0..1",
    callback=_strength,
    help="How much of the inputs' outliers moves into the weights: searched for each group, or one strength for all.",
)
@click.option(
    "--static", is_flag=True, help="One calibrated range of inputs a layer, for readers of Q/DQ; else one a token."
)
@click.option(
    "--sym-activations/--asym-activations",
    default=None,
    help="Inputs without zero points, or with [default: with, which vLLM on NVIDIA cards and CPUs and `onnx` compute; "
    "without where --static, for TensorRT].",
)
@click.option(
    "--keep-inputs",
    default="0",
    show_default=True,
    metavar="auto|N",
    callback=_kept,
    help="Layers whose inputs stay floats (W8A16): N groups of one input, those that lose most; auto: those that lose "
    "over 4 times what the median does. Measured first, on 16 rows.",
)
@click.option(
    "--kv-cache", type=click.Choice(["int8"]), help="Keys and values in INT8 as well (vLLM's int8_per_token_head)."
)
@click.option(
    "--group-size",
    type=int,
    default=-1,
    show_default=True,
    help="Input channels that share a scale (w8a16 only); -1: one scale a row.",
)
@click.option(
    "--effort",
    type=click.Choice(["auto", "fast", "balanced"]),
    default="auto",
    show_default=True,
    help="fast: smoothing and fitted ranges; balanced: with error feedback, which halves the error of weights; auto: "
    "fast for w8a8, where inputs lose more than that, else balanced.",
)
@calibrated()
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder to make [default: artifacts/NAME-int8-w8a8]."
)
def command(
    model: str | None,
    out: Path | None,
    as_json: bool,
    device: str,
    dtype: str,
    **rest: Any,
) -> None:
    """Quantize MODEL (a Hugging Face folder or hub id) to INT8, block by block.

    The result is a compressed-tensors folder, which vLLM, SGLang and transformers load, with a manifest, compress.json.
    A killed run goes on where it was, and ends with the same bytes.
    """
    started = time.monotonic()
    from compress.devices import pick_device, pick_dtype

    # Options that do not fit each other are refused before a model is looked for.
    from compress.quantize.int8_stage import Int8Request, quantize_int8
    from compress.workspace import WORKSPACE, Source

    nowhere = Source(path=Path(), name="", said="")
    revision, adapter = rest.pop("revision"), rest.pop("adapter")
    label = Int8Request(source=nowhere, out=Path(), **rest).label()
    source = model_of(
        model, out=out, force=rest["force"], revision=revision, adapter=adapter, trust=rest["trust_remote_code"]
    )  # fmt: skip
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    say_where(source, device, dtype)
    target = out or WORKSPACE / f"{source.name}-int8-{label}"
    request = Int8Request(source=source, out=target, device=device, dtype=dtype, **rest)
    with Shown(quiet=as_json, describe=block_text) as shown:
        outcome = quantize_int8(request, shown)
    ended = time.monotonic()
    if as_json:
        # `seconds`: from the model and text being ready to the verified artifact
        print_json(outcome, ended - started, seconds=ended - shown.started.get("block", started))
    else:
        _print_summary(outcome, ended - started, label)


def _print_summary(outcome: Any, seconds: float, label: str) -> None:
    record = outcome.record
    to = console()
    columns = {
        "of inputs": lambda layer: f"{layer['inputs_error']:.3e}",
        "smoothing": lambda layer: f"{layer['strength']:.1f}{' descended' if layer['descended'] else ''}",
    }
    to.print(worst_layers(record["layers"], columns))
    if "kept_inputs" in record:
        kept, measured = record["kept_inputs"]["groups"], record["kept_inputs"]["measured"]
        said = ", ".join(f"{'/'.join(group['layers'])} {group['error']:.1e}" for group in kept) or "none stands out"
        to.print(f"inputs stay floats in {len(kept)} of {measured} groups of layers: {said}", soft_wrap=True)
    cache = record.get("kv_cache")
    if cache:
        said = ", ".join(f"{part} {max(c[part] for c in cache):.1e}" for part in ("keys", "values", "both"))
        to.print(f"INT8 KV cache, error of the worst block's output: {said}")
    print_found(to, outcome)
    print_written(to, outcome, seconds, label, record["left_dense"])
    to.print(f"next: {judge(outcome.out)}   or, for less error: {_advice(record)}", soft_wrap=True)


def _advice(record: Mapping[str, Any]) -> str:
    options = record["options"]
    if options["scheme"] == "w8a16":
        if options["effort"] != "balanced":
            return "--effort balanced"
        return "--group-size 128" if options["group_size"] == -1 else "--skip the worst layers"
    if options["static"]:
        return "leave --static out, if your reader quantizes by token"
    ways = ["--asym-activations"] if options["sym_activations"] else []
    ways += ["--keep-inputs auto"] if options["keep_inputs"] == 0 else []
    return ", ".join([*ways, "or --scheme w8a16" if ways else "--scheme w8a16"])
