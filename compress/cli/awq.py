"""`compress awq`: options, progress and the closing summary. The work is in `compress.quantize.awq_stage`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    pass


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


@click.command("awq", cls=Command)
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
    help="fast: AWQ scales and error feedback, one pass; balanced: each block also makes up for those before it; "
    "best: each block tuned as well.",
)
@click.option(
    "--end-to-end",
    type=click.IntRange(0),
    help="Updates of codes, scales and norms through the whole model, held in memory, once its blocks are done, from "
    "the original's predictions [default: 400 with `best` at 4 bits on a GPU, up to 4 GB of weights; else 0].",
)
@calibrated(
    self_samples="Rows sampled from the model itself, added to the text; of a chat model every other one is a "
    "conversation [default: with `best`, as many as the text has].",
    seed="Seed of sampling from the model and of tuning.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Folder to make [default: artifacts/NAME-awq-w4g128].",
)
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
    from compress.devices import pick_device, pick_dtype
    from compress.quantize.awq_stage import AwqRequest, check_codes, quantize_awq
    from compress.quantize.group_size import asked_scheme
    from compress.workspace import WORKSPACE

    symmetric = check_codes(bits, sym)
    source = model_of(
        model, out=out, force=rest["force"], revision=rest.pop("revision"), adapter=rest.pop("adapter"),
        trust=rest["trust_remote_code"],
    )  # fmt: skip
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    say_where(source, device, dtype)
    trusted = rest["trust_remote_code"]
    scheme, why = asked_scheme(source.path, bits, group_size, symmetric, rest["skip"], trust_remote_code=trusted)
    if why:
        print(why, file=sys.stderr)
    target = out or WORKSPACE / f"{source.name}-awq-{scheme.label()}"
    request = AwqRequest(source=source, out=target, scheme=scheme, device=device, dtype=dtype, **rest)
    with Shown(quiet=as_json, describe=block_text) as shown:
        outcome = quantize_awq(request, shown)
    ended = time.monotonic()
    if as_json:
        # `seconds`: from the model and text being ready to the verified artifact
        print_json(outcome, ended - started, seconds=ended - shown.started.get("block", started))
    else:
        _print_summary(outcome, ended - started)


def _print_summary(outcome: Any, seconds: float) -> None:
    record = outcome.record
    out = console()
    columns = {"scale ratio": lambda layer: f"{layer['ratio']:.2f}", "mean clip": lambda layer: f"{layer['clip']:.3f}"}
    out.print(worst_layers(record["layers"], columns, ", before tuning" if record["tuning"] else ""))
    lifted = [g for g in record["groups"] if g.get("lift")]
    if lifted:
        names = ", ".join(f"block {g['block']} {g['layers'][0]}" for g in lifted[:3])
        out.print(
            f"the weights of {len(lifted)} groups lay below what float16 scales hold; a power of two was moved there "
            f"from what comes before them ({names}{', ...' if len(lifted) > 3 else ''})"
        )
    print_found(out, outcome)
    print_written(out, outcome, seconds, _label(record), record["left_in_float16"])
    tuned = record["tuning"]
    if tuned:
        gain = sum(t["held_out_error_tuned"] for t in tuned if t["kept"]) / max(
            1e-30, sum(t["held_out_error"] for t in tuned if t["kept"])
        )
        out.print(
            f"tuning lowered the blocks' held-out output error to {gain:.2f} of what it was; kept in "
            f"{sum(t['kept'] for t in tuned)} of {len(tuned)} blocks"
        )
        slower = [t for t in tuned if "slower" in t]
        if slower:
            out.print(f"in {len(slower)} blocks: {slower[0]['slower']}")
    whole = record.get("end_to_end", {})
    if "kept" in whole:
        out.print(
            f"codes, scales and norms learned through the whole model: KL divergence on {whole['held_out_rows']} "
            f"held-out rows {whole['held_out_kl']:.4f} before, {whole['held_out_kl_learned']:.4f} after"
            f"{'' if whole['kept'] else ', so it was undone'}"
        )
    out.print(f"next: {judge(outcome.out)}   or, for less error: {_advice(record)}", soft_wrap=True)


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
