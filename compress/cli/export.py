"""`compress export`: options, progress and the size table. The work is in `exporters.export`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compress.cli.help import Command
from compress.cli.progress import Shown, peak_memory_bytes, seconds_text
from compress.errors import ConfigError

if TYPE_CHECKING:
    from exporters.export import ExportOutcome
    from exporters.sizing.predict import DoesNotFit, Sizing


@click.command("export", cls=Command)
@click.argument("artifact", required=False)
@click.option("--target", required=True, metavar="TARGET", help="The machine; `compress targets` lists them.")
@click.option("--format", metavar="FORMAT", help="hf, onnx, onnx-trt, tensorrt or edge [default: the target's first].")
@click.option("--context", type=click.IntRange(1), help="Tokens, prompt and answer [default: the target's].")
@click.option(
    "--batch", type=click.IntRange(1), help="Sequences at once [default: 1; format hf: as many as fit, at most 256]."
)
@click.option("--opset", type=click.Choice(["21", "24"]), help="ONNX dialect of onnx-trt and tensorrt.")
@click.option(
    "--builder",
    type=click.Choice(["tensorrt", "tensorrt-rtx"]),
    help="Format tensorrt: what builds the engine [default: whichever here can, for TARGET's card].",
)
@click.option(
    "--profiles",
    type=click.Choice(["two", "one"]),
    help="Format tensorrt: two, for prompt and answer, or one, which holds the weights once [default: two].",
)
@click.option(
    "--activations",
    type=click.Choice(["float32", "int16", "int8"]),
    help="Format onnx: what weights-only products compute with; integers are quicker and less exact [default: float32 "
    "for INT4, int16 for INT8].",
)
@click.option(
    "--head",
    type=click.Choice(["float", "int8"]),
    help="Format onnx, with integer activations: the output matrix; 8 bits are a quarter of what is read of it "
    "[default: int8].",
)
@click.option(
    "--modelopt/--no-modelopt",
    default=True,
    show_default=True,
    help="Format hf: also write the codes in ModelOpt's layout, if they are symmetric.",
)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder to make [default: artifacts/NAME-TARGET-FORMAT]."
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def command(
    artifact: str | None,
    target: str,
    format: str | None,
    context: int | None,
    batch: int | None,
    opset: str | None,
    builder: str | None,
    profiles: str | None,
    activations: str | None,
    head: str | None,
    modelopt: bool,
    out: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Turn ARTIFACT into what TARGET runs: sized first, verified before it says "wrote".

    Without ARTIFACT: the newest one of ./artifacts. Where the target's reader needs other codes (symmetric ones, say),
    the artifact's recorded recipe runs again from its parent. Exit code 1 if it does not fit, with what would.
    """
    started = time.monotonic()
    from compress.workspace import is_model, resolve
    from exporters.export import ExportRequest, export, format_of, target_named
    from exporters.sizing.predict import DoesNotFit

    machine = target_named(target)
    chosen = format_of(format, machine)
    options = options_of(chosen, opset, builder, profiles, activations, head, modelopt)
    source = resolve(artifact, accept=is_model, out=out, force=force)
    print(f"artifact: {source.said}", file=sys.stderr)
    request = ExportRequest(
        source=source,
        target=machine,
        format=chosen,
        context=context,
        batch=batch,
        out=out,
        force=force,
        options=options,
    )
    with Shown(quiet=as_json, describe=lambda found: "quantized") as shown:
        try:
            outcome = export(request, tell=shown)
        except DoesNotFit as e:
            shown.end()
            _print_too_big(e, as_json)
            raise
    if as_json:
        print(json.dumps(_as_json(outcome, time.monotonic() - started), indent=2))
    else:
        _print(outcome, time.monotonic() - started)


def options_of(
    chosen: str,
    opset: str | None,
    builder: str | None,
    profiles: str | None,
    activations: str | None,
    head: str | None,
    modelopt: bool,
) -> dict[str, Any]:
    """The options of one format; ConfigError where another was chosen."""
    options: dict[str, Any] = {}
    if opset is not None:
        if chosen not in ("onnx-trt", "tensorrt"):
            raise ConfigError(
                f"--opset {opset}: only the formats onnx-trt and tensorrt have dialects, not {chosen}; leave it out"
            )
        options["opset"] = int(opset)
    for name, value in (("builder", builder), ("profiles", profiles)):
        if value is not None:
            if chosen != "tensorrt":
                raise ConfigError(
                    f"--{name} {value}: only the format tensorrt builds engines, not {chosen}; leave it out"
                )
            options[name] = value
    for name, value in (("activations", activations), ("head", head)):
        if value is not None:
            if chosen != "onnx":
                raise ConfigError(f"--{name} {value}: only the format onnx has a choice, not {chosen}; leave it out")
            options[name] = value
    if not modelopt:
        if chosen != "hf":
            raise ConfigError(f"--no-modelopt: only the format hf has a ModelOpt folder, not {chosen}; leave it out")
        options["modelopt"] = False
    return options


def _as_json(outcome: ExportOutcome, seconds: float) -> dict[str, Any]:
    return {
        "out": str(outcome.out),
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "requantized": str(outcome.requantized) if outcome.requantized else None,
        "parts": outcome.parts,
        "bytes": outcome.total_bytes,
        "fp16_bytes": outcome.fp16_bytes,
        "fp32_bytes": outcome.fp32_bytes,
        "notes": outcome.notes,
        "command": outcome.command,
        "judge": _judge(outcome),
        "record": outcome.record,
    }


def _print(outcome: ExportOutcome, seconds: float) -> None:
    from rich.table import Table

    from compress.cli.console import Console

    console = Console()
    console = console if console.is_terminal else Console(width=120)
    total = outcome.total_bytes
    table = Table(title="Size", title_justify="left")
    table.add_column("part")
    for column in ("MB", "share"):
        table.add_column(column, justify="right")
    for part, size in outcome.parts.items():
        table.add_row(part, f"{size / 1e6:.2f}", f"{size / max(1, total):.1%}")
    table.add_section()
    table.add_row("all", f"{total / 1e6:.2f}", "")
    for label, size in (("FP16", outcome.fp16_bytes), ("FP32", outcome.fp32_bytes)):
        table.add_row(f"the same model in {label}", f"{size / 1e6:.2f}", f"{size / max(1, total):.2f} x")
    console.print(table)
    _print_sizing(console, outcome.sizing, outcome.record["target"])
    for note in outcome.notes:
        console.print(f"note: {note}", soft_wrap=True)
    if outcome.requantized:
        console.print(
            f"the codes that ship are those of {outcome.requantized}, quantized again for this reader: a verdict on "
            f"the artifact that you named does not hold for them. Judge them: {_judge(outcome)}",
            soft_wrap=True,
        )
    verified = outcome.record["written"]["verified"]
    said = ", ".join(
        f"{key.replace('_', ' ')} {value}" for key, value in verified.items() if not isinstance(value, dict)
    )
    console.print(f"verified: {said}", soft_wrap=True)
    console.print(
        f"wrote {outcome.out}/  {outcome.record['format']} for {outcome.record['target']}; {seconds_text(seconds)}, "
        f"peak memory {peak_memory_bytes() / 2**20:.0f} MiB",
        soft_wrap=True,
    )
    console.print(f"{outcome.verb}: {outcome.command}", soft_wrap=True)


def _judge(outcome: ExportOutcome) -> str:
    """The command that judges an export's own weights."""
    from compress.cli.next import judge

    return judge(outcome.out, "--gate", "0.98", context=outcome.record["options"]["context"])


def _print_sizing(console: Any, sizing: Sizing, target: str) -> None:
    from compress.cli.fit import range_text

    parts = ", ".join(f"{part} {size / 1e9:.3f}" for part, size in sizing.parts().items())
    console.print(
        f"on {target}, predicted: {sizing.run_peak / 1e9:.2f} GB of {sizing.usable / 1e9:.2f} usable ({parts})",
        soft_wrap=True,
    )
    if sizing.decode_tokens_per_s:
        prompt = min(sizing.plan.prompt, sizing.plan.context)
        together = f" of all {sizing.plan.batch} sequences" if sizing.plan.batch > 1 else ""
        console.print(
            f"predicted, not measured: {range_text(sizing.decode_tokens_per_s)} tokens/s{together}, first token after "
            f"{range_text(sizing.first_token_s)} s for a prompt of {prompt}",
            soft_wrap=True,
        )
    if note := sizing.build_note():
        console.print(note, soft_wrap=True)


def _print_too_big(error: DoesNotFit, as_json: bool) -> None:
    suggestions = [
        {"change": s.text, "made": s.made, "run_peak": s.sizing.run_peak, "fits": s.sizing.fits}
        for s in error.suggestions
    ]
    if as_json:
        print(json.dumps({"error": str(error), "sizing": error.sizing.to_json(), "fitting": suggestions}, indent=2))
        return
    from rich.table import Table

    from compress.cli.console import Console

    console = Console(stderr=True)
    console = console if console.is_terminal else Console(stderr=True, width=120)
    table = Table(title="Predicted memory", title_justify="left")
    table.add_column("part")
    table.add_column("GB", justify="right")
    for part, size in error.sizing.parts().items():
        table.add_row(part, f"{size / 1e9:.3f}")
    table.add_section()
    table.add_row("run peak", f"{error.sizing.run_peak / 1e9:.3f}")
    table.add_row("usable", f"{error.sizing.usable / 1e9:.3f}")
    console.print(table)
    for s in error.suggestions:
        planned = "" if s.made else " (planned, not in this version)"
        console.print(f"would fit: {s.text}: {s.sizing.run_peak / 1e9:.2f} GB{planned}", soft_wrap=True)
