"""`compress awq`: options, progress and the closing summary. The work is in `compress.quantize.awq_stage`."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compress import advice
from compress.cli.calibrated import print_json
from compress.cli.progress import Shown, peak_memory_bytes, seconds_text

if TYPE_CHECKING:
    from rich.table import Table


class GroupSize(click.ParamType):  # type: ignore[type-arg]
    """A number of input channels, or `auto`, which is None."""

    name = "auto|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value is None or value == "auto":
            return None
        if isinstance(value, int) or value.isdecimal():
            size = int(value)
            if size >= 8:
                return size
        self.fail(f"{value!r} is neither auto nor a number from 8 on; choose auto, 128, 64 or 32", param, ctx)


@click.command("awq")
@click.argument("model", required=False)
@click.option("--bits", type=int, default=4, show_default=True, help="Bits a weight, 4 or 8.")
@click.option(
    "--group-size",
    type=GroupSize(),
    default="auto",
    show_default=True,
    help="Input channels that share a scale; auto: the largest of 128, 64 and 32 that divides every layer's.",
)
@click.option(
    "--sym/--asym",
    default=None,
    help="Zero points in the middle (TensorRT readers), or fitted [default: --asym at 4 bits; 8 bits are --sym].",
)
@click.option(
    "--effort",
    type=click.Choice(["fast", "balanced", "best"]),
    default="balanced",
    show_default=True,
    help="fast: AWQ scales and fitted ranges; balanced: with error feedback; best: each block tuned as well.",
)
@click.option(
    "--calib",
    metavar="TEXT",
    help="Calibration text: a .txt, .jsonl or .parquet file, hf:DATASET[:split[:column]], or `self` (sampled from the "
    "model). Default: the bundled set for the reference model; for others `self` up to 1 GB of weights (4 GB on a "
    "GPU), larger ones need a text.",
)
@click.option("--samples", type=click.IntRange(1), default=128, show_default=True, help="Calibration rows.")
@click.option("--seq-len", type=click.IntRange(1), default=512, show_default=True, help="Tokens in a row.")
@click.option(
    "--device", default="auto", show_default=True, help="Where blocks are computed: cpu, cuda[:N]; auto: a GPU if any."
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Arithmetic of the calibration forward passes (auto: float32 on a CPU, bfloat16 on a GPU); searches are "
    "float32.",
)
@click.option(
    "--self-samples",
    type=click.IntRange(0),
    help="Rows sampled from the model itself, added to the text [default: with `best`, up to 128 rows in all].",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of sampling from the model and of tuning.")
@click.option("--skip", multiple=True, metavar="PATTERN", help="Layers to leave in float16, such as '*.down_proj'.")
@click.option("--allow-damage", is_flag=True, help="Go on when a layer's output would be mostly error, and list it.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Folder to make [default: artifacts/NAME-awq-w4g128].",
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on with a run that was killed.")
@click.option("--trust-remote-code", is_flag=True, help="Run the Python code that the model's folder ships.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def command(
    model: str | None,
    out: Path | None,
    as_json: bool,
    bits: int,
    group_size: int | None,
    sym: bool | None,
    device: str,
    dtype: str,
    **rest: Any,
) -> None:
    """Quantize MODEL (a Hugging Face folder or hub id) to AWQ INT4 or INT8, block by block.

    The result is an AutoAWQ `gemm` folder (4 bits) or a compressed-tensors folder (8 bits, weights only) with a
    manifest, compress.json. A killed run goes on where it was, and ends with the same bytes.
    """
    started = time.monotonic()
    from compress.devices import described, pick_device, pick_dtype
    from compress.quantize.awq_stage import AwqRequest, check_codes, quantize_awq
    from compress.scheme import Scheme
    from compress.workspace import WORKSPACE, is_model, resolve

    symmetric = check_codes(bits, sym)
    source = resolve(model, quantizable=True, accept=is_model)
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    print(f"model: {source.said}\ncomputed on: {described(device)}, {dtype}", file=sys.stderr)
    from compress.model import StreamedModel
    from compress.quantize.group_size import chosen_group_size
    from compress.stage import refuse_quantized

    if group_size is None:
        outline = StreamedModel.outline(source.path, trust_remote_code=rest["trust_remote_code"])
        refuse_quantized(outline)
        group_size, why = chosen_group_size(outline, rest["skip"])
        if why:
            print(why, file=sys.stderr)
    scheme = Scheme(num_bits=bits, group_size=group_size, symmetric=symmetric)

    target = out or WORKSPACE / f"{source.name}-awq-{scheme.label()}"
    request = AwqRequest(source=source, out=target, scheme=scheme, device=device, dtype=dtype, **rest)
    with Shown(quiet=as_json, describe=_block_text) as shown:
        outcome = quantize_awq(request, shown)
    ended = time.monotonic()
    if as_json:
        print_json(outcome, ended - (shown.started or started), ended - started)
    else:
        _print_summary(outcome, ended - started)


def _block_text(report: Mapping[str, Any]) -> str:
    worst = max(report["layers"], key=lambda layer: layer["error"], default=None)
    if worst is None:
        return "nothing to quantize"
    return f"worst {worst['layer'].split('.')[-1]} {worst['error']:.2e} (round-to-nearest {worst['rtn_error']:.2e})"


def _print_summary(outcome: Any, seconds: float) -> None:
    from compress.cli.console import Console

    record = outcome.record
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(_worst_layers(record))
    unfolded = [g for g in record["groups"] if g["fold"] is None]
    if unfolded:
        names = ", ".join(sorted({g["layers"][0].rsplit(".", 1)[-1] for g in unfolded}))
        console.print(
            f"no smoothing for {len(unfolded)} of {len(record['groups'])} groups ({names}): see compress.json"
        )
    lifted = [g for g in record["groups"] if g.get("lift")]
    if lifted:
        names = ", ".join(f"block {g['block']} {g['layers'][0]}" for g in lifted[:3])
        console.print(
            f"the weights of {len(lifted)} groups lay below what float16 scales hold; a power of two was moved there "
            f"from what comes before them ({names}{', ...' if len(lifted) > 3 else ''})"
        )
    if record["damaged"]:
        console.print(f"DAMAGED, as you allowed: {', '.join(record['damaged'])}", soft_wrap=True)
    calibration = record["calibration"]
    if calibration["num_samples"] < record["options"]["samples"]:
        console.print(
            f"calibration text filled {calibration['num_samples']} of {record['options']['samples']} rows; "
            "more text would be used"
        )
    for note in outcome.notes:
        console.print(note)
    size, before = outcome.out_bytes, outcome.source_bytes
    left = ", ".join(record["left_in_float16"][:3]) + (", ..." if len(record["left_in_float16"]) > 3 else "")
    console.print(
        f"wrote {outcome.out}/  {size / 1e6:.1f} MB (was {before / 1e6:.1f} MB)  "
        f"{_label(record)}  {len(record['layers'])} layers, left in float16: {left}",
        soft_wrap=True,
    )
    console.print(
        f"verified {outcome.verified} tensors by reading them back; {seconds_text(seconds)}, "
        f"peak memory {peak_memory_bytes() / 2**20:.0f} MiB",
        soft_wrap=True,
    )
    tuned = record["tuning"]
    if tuned:
        gain = sum(t["held_out_error_tuned"] for t in tuned if t["kept"]) / max(
            1e-30, sum(t["held_out_error"] for t in tuned if t["kept"])
        )
        console.print(
            f"tuning lowered the blocks' held-out output error to {gain:.2f} of what it was; kept in "
            f"{sum(t['kept'] for t in tuned)} of {len(tuned)} blocks"
        )
    console.print(
        f"next: {advice.command('evaluate', outcome.out)}   or, for less error: {_advice(record)}", soft_wrap=True
    )


# Layers that the closing table shows; the manifest has all.
SHOWN = 8


def _worst_layers(record: dict[str, Any]) -> Table:
    from rich.table import Table

    layers = sorted(record["layers"], key=lambda layer: -layer["error"])
    when = ", before tuning" if record["tuning"] else ""
    where = "; all are in compress.json" if len(layers) > SHOWN else ""
    table = Table(
        title=f"worst layers of {len(layers)}: squared output error over the output's own square{when}{where}",
        title_justify="left",
    )
    for column in ("layer", "error", "round-to-nearest", "of it", "scale ratio", "mean clip"):
        table.add_column(column, justify="left" if column == "layer" else "right", no_wrap=True)
    for layer in layers[:SHOWN]:
        table.add_row(
            layer["layer"],
            f"{layer['error']:.3e}",
            f"{layer['rtn_error']:.3e}",
            f"{layer['error'] / max(layer['rtn_error'], 1e-30):.2f}",
            f"{layer['ratio']:.2f}",
            f"{layer['clip']:.3f}",
        )
    return table


def _label(record: dict[str, Any]) -> str:
    from compress.scheme import Scheme

    scheme = record["options"]["scheme"]
    return Scheme(num_bits=scheme["num_bits"], group_size=scheme["group_size"], symmetric=scheme["symmetric"]).label()


def _advice(record: dict[str, Any]) -> str:
    options = record["options"]
    scheme = options["scheme"]
    if options["effort"] != "best":
        return "--effort best" if options["effort"] == "balanced" else "--effort balanced"
    if scheme["symmetric"] and scheme["num_bits"] == 4:
        return "--asym, if your reader takes zero points"
    if scheme["group_size"] > 32:
        return f"--group-size {scheme['group_size'] // 2}, or --skip the worst layers"
    return "--skip the worst layers"
