"""`compress fit`: what of a model would fit a machine, and how fast it might be, before anything is quantized."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compress.cli.help import Command
from compress.errors import ConfigError

if TYPE_CHECKING:
    from compress.model import StreamedModel
    from compress.scheme import Scheme
    from exporters.sizing.inventory import Model
    from exporters.sizing.predict import Sizing
    from exporters.sizing.targets import Target

CONTEXTS = (2048, 8192, 32768)
BITS = (16, 8, 4)


@click.command("fit", cls=Command)
@click.argument("model", required=False)
@click.option("--target", required=True, metavar="TARGET", help="The machine; `compress targets` lists them.")
@click.option("--format", metavar="FORMAT", help="The reader's format [default: the target's first].")
@click.option("--context", type=click.IntRange(1), help="Tokens [default: several].")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences at once.")
@click.option("--json", "as_json", is_flag=True, help="Print as one JSON object.")
def command(model: str | None, target: str, format: str | None, context: int | None, batch: int, as_json: bool) -> None:
    """Will MODEL fit TARGET? A table of choices: bits of weights and of the KV cache, and context.

    Exit code 0 if a choice fits that this version can make, 1 otherwise. Of a hub model only config.json is fetched.
    Speeds are predictions from published shares of bandwidth and arithmetic, not measurements.
    """
    from compress.model import StreamedModel
    from compress.workspace import config_only, is_model, resolve
    from exporters.export import format_of, target_named

    machine = target_named(target)
    chosen = format_of(format, machine)
    if model is None:
        source = resolve(None, quantizable=True, accept=is_model)
        folder, said = source.path, source.said
    else:
        folder, said = config_only(model), model
    print(f"model: {said}", file=sys.stderr)
    outline = StreamedModel.outline(folder)  # says what it is that is no dense decoder
    found = _inventory(folder)
    rows = choices(found, machine, chosen, context, batch, outline)
    fitting = [r for r in rows if r["fits"] and r["made"]]
    refused = dict.fromkeys(r["refused"] for r in rows if r["refused"])
    if as_json:
        print(json.dumps(_as_json(found, machine, chosen, batch, rows), indent=2))
    else:
        _print(found, machine, chosen, batch, rows, outline)
        for reason in refused:
            print(f"cannot be made: {reason}")
        if refused:
            from exporters import answer

            codes = True if any(r["made"] for r in rows) else None
            tokens = context or min(machine.context, found.max_positions or machine.context)
            print(answer.nearest(outline, model or folder, machine, tokens, codes=codes))
    sys.exit(0 if fitting else 1)


def _inventory(folder: Path) -> Model:
    from exporters.sizing.inventory import read_model

    return read_model(folder)


def choices(
    model: Model, target: Target, format: str, context: int | None, batch: int, outline: StreamedModel
) -> list[dict[str, Any]]:
    """One row a choice: bits, kv_bits, context, its sizing, and whether this version and the reader can make it.

    refused: why the format's reader cannot hold it (`exporters.answer`), or None. A model that is quantized already is
    sized as it is.
    """
    from compress.scheme import Scheme
    from exporters import answer
    from exporters.sizing.predict import KV_BITS, MADE_BITS, Plan, size

    limit = model.max_positions or max(CONTEXTS)
    if context and context > limit:
        raise ConfigError(f"--context {context}: the model has {limit} positions; ask for at most that")
    contexts = [context] if context else sorted({min(c, limit) for c in (*CONTEXTS, target.context)})
    native = KV_BITS[format]
    codes: dict[int | None, Scheme | None] = {16: None, 8: None, 4: None, None: None}
    if model.scheme is None:
        codes[4] = answer.codes_for(outline, format)
        codes[8] = Scheme(num_bits=8, group_size=-1, symmetric=True)
    else:
        codes[None] = answer.held(outline, format)
    group_size = codes[4].group_size if codes[4] else 128
    rows = []
    for bits in BITS if model.scheme is None else (None,):
        for kv_bits in dict.fromkeys((native[0], 8)):
            for tokens in contexts:
                plan = Plan(
                    format=format, context=tokens, batch=batch, num_bits=bits, kv_bits=kv_bits, group_size=group_size
                )
                sizing: Sizing = size(model, plan, target)
                planned = (bits is not None and bits not in MADE_BITS[format]) or kv_bits not in native
                refused = answer.refusal(outline, format, tokens, codes[bits])
                made = not planned and refused is None
                rows.append(
                    {
                        "weights": _weights(model, bits, format, group_size),
                        "kv_bits": kv_bits,
                        "context": tokens,
                        "made": made,
                        "refused": refused,
                        "fits": sizing.fits,
                        "sizing": sizing,
                    }
                )
    return rows


def _weights(model: Model, bits: int | None, format: str, group_size: int) -> str:
    if bits is None:
        assert model.scheme is not None
        return f"as stored, {model.scheme.label()}"
    if bits == 16:
        return "FP32" if format == "onnx" else "FP16"
    return "INT8" if bits == 8 else f"INT{bits} g{group_size}"


def _as_json(model: Model, target: Target, format: str, batch: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": model.name,
        "parameters": model.num_parameters,
        "target": target.name,
        "format": format,
        "batch": batch,
        "choices": [{**row, "sizing": row["sizing"].to_json()} for row in rows],
    }


def _print(
    model: Model, target: Target, format: str, batch: int, rows: list[dict[str, Any]], outline: StreamedModel
) -> None:
    from rich.table import Table

    from compress.cli.console import Console
    from exporters.sizing.predict import KV_BITS, MADE_BITS

    console = Console()
    console = console if console.is_terminal else Console(width=120)
    table = Table(
        title=f"{model.name} ({model.num_parameters / 1e9:.2f} B parameters) on {target.title}, format {format}, "
        f"batch {batch}; {target.usable_bytes / 1e9:.1f} GB usable",
        title_justify="left",
    )
    for column in ("weights", "KV", "context", "run peak, GB", "fits", "tokens/s *", "first token, s *"):
        table.add_column(column, justify="left" if column in ("weights", "fits") else "right", no_wrap=True)
    for row in rows:
        sizing: Sizing = row["sizing"]
        fits = "yes" if row["fits"] else "no"
        table.add_row(
            row["weights"],
            f"{row['kv_bits']} bit",
            str(row["context"]),
            f"{sizing.run_peak / 1e9:.2f}",
            "cannot be made" if row["refused"] else fits if row["made"] else f"{fits} (planned)",
            range_text(sizing.decode_tokens_per_s),
            range_text(sizing.first_token_s),
        )
    console.print(table)
    prompt = min(rows[0]["sizing"].plan.prompt, rows[0]["sizing"].plan.context)
    console.print(
        "* predicted from the roofline and the shares of it that published runs reach; not measured. First token: of "
        f"a prompt of {prompt} tokens. planned: for {format} this version makes weights of "
        f"{', '.join(map(str, MADE_BITS[format]))} bits and a KV cache of {', '.join(map(str, KV_BITS[format]))}."
        " - : nothing published to predict from, or a model smaller than those runs.",
        soft_wrap=True,
    )
    smallest = min((r["sizing"] for r in rows if r["made"]), key=lambda s: s.run_peak, default=rows[-1]["sizing"])
    if note := smallest.build_note():
        console.print(note, soft_wrap=True)
    if not any((r["fits"] and r["made"]) or r["refused"] for r in rows):
        from exporters import answer
        from exporters.sizing.predict import what_fits

        ways = [s for s in what_fits(model, smallest.plan, target, answer.taker(outline)) if s.made]
        said = (
            "; ".join(f"{s.text} ({s.sizing.run_peak / 1e9:.2f} GB)" for s in ways) or "nothing that can be made today"
        )
        console.print(f"none of these fits. What would: {said}", soft_wrap=True)


def range_text(value: tuple[float, float] | None) -> str:
    """`12 to 20`, or `-` when nothing can be predicted."""
    return "-" if value is None else " to ".join(f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in value)
