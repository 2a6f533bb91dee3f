"""`compress auto`: bits where they count, the smallest artifact that passes. The work is in `compress.search`."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compress.cli.calibrated import calibrated, console, model_of, say_where
from compress.cli.help import Command
from compress.cli.judges import GATE, Judges, text_to_judge, unvetted
from compress.cli.next import judge as judging_command
from compress.cli.progress import Shown, peak_memory_bytes, seconds_text
from compress.errors import ConfigError, GateFailed

if TYPE_CHECKING:
    from compress.model import StreamedModel
    from compress.plan import LayerPlan
    from compress.quantize.auto_stage import AutoRequest
    from compress.quantize.choices import Choice
    from compress.quantize.menu import Menu
    from compress.search import Found, Goal, Judged
    from compress.workspace import Source


@click.command("auto", cls=Command)
@click.argument("model", required=False)
@click.option("--target", metavar="TARGET", help="Goal: fits this machine, in what a reader of it takes.")
@click.option("--format", "format_", metavar="FORMAT", help="Which reader of TARGET [default: hf, else its first].")
@click.option(
    "--context", type=click.IntRange(1), help="Tokens that TARGET must have room for [default: the target's]."
)
@click.option("--bytes", "num_bytes", metavar="SIZE", help="Goal: at most so many bytes of weights, such as 90M.")
@click.option(
    "--gate", type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Goal: the smallest artifact that keeps so much, on text held out [default: 0.98; with --bytes: none].",
)  # fmt: skip
@click.option("--data", metavar="TEXT", help="Text held out to judge on, as for `compress evaluate`.")
@click.option(
    "--max-tokens", type=click.IntRange(2), default=102_400, show_default=True, help="Tokens of DATA to judge on."
)
@click.option(
    "--tries",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Artifacts made and judged at most; bounds allow for so many.",
)
@click.option(
    "--effort", type=click.Choice(["fast", "balanced"]), default="balanced", show_default=True,
    help="As for `compress awq`.",
)  # fmt: skip
@click.option(
    "--sym/--asym", "symmetric", default=False, show_default=True,
    help="INT4 without zero points, or with them: better, but transformers does not load such mixes by itself.",
)  # fmt: skip
@click.option("--int8/--no-int8", default=True, show_default=True, help="Whether INT8 may be chosen.")
@click.option("--float16/--no-float16", default=True, show_default=True, help="Whether float16 may be chosen.")
@click.option(
    "--lm-head/--no-lm-head", "lm_head", default=False, show_default=True,
    help="Whether the output matrix is chosen for too, where it is not the embedding: vLLM since March 2026.",
)  # fmt: skip
@calibrated(seed="Seed of sampling from the model.")
@click.option("--dry-run", is_flag=True, help="Say what could be chosen, and write nothing.")
@click.option(
    "--report", type=click.Path(path_type=Path), help="Page to write: size against divergence, what was chosen."
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to make [default: artifacts/NAME-auto].")
def command(
    model: str | None, out: Path | None, as_json: bool, dry_run: bool, report: Path | None, target: str | None,
    format_: str | None, context: int | None, num_bytes: str | None, gate: float | None, data: str | None,
    max_tokens: int, tries: int, symmetric: bool, int8: bool, float16: bool, lm_head: bool, device: str, dtype: str,
    **rest: Any,
) -> None:  # fmt: skip
    """Choose for each set of linears of MODEL that share an input: INT4 in groups of 128, 64 or 32, INT8, or float16.

    What each choice costs is measured once, on the calibration text; then the smallest artifact that passes the gate is
    looked for: each one tried is made and judged on text held out. Embeddings stay in float16, since few readers take
    them otherwise, and so does the output matrix without --lm-head. The exit code is 3 when nothing within the goals
    passes.
    """
    started = time.monotonic()
    from compress.cli.prune import check_page
    from compress.devices import pick_device, pick_dtype
    from compress.quantize.auto_stage import AutoRequest
    from compress.quantize.menu import Menu
    from compress.search import Goal, search
    from compress.workspace import WORKSPACE

    source = model_of(
        model, out=None if dry_run else out, force=rest["force"], revision=rest.pop("revision"),
        adapter=rest.pop("adapter"), trust=rest["trust_remote_code"],
    )  # fmt: skip
    if report is not None:
        check_page(report, source.path)
    gate = GATE if gate is None and num_bytes is None else gate
    data = text_to_judge(source, data, gate, rest["calib"])
    wanted = Menu(symmetric=symmetric, int8=int8, dense=float16, lm_head=lm_head)
    opened, menu, most, reader = asked_for(
        source, target, format_, context, num_bytes, wanted, rest["trust_remote_code"]
    )  # fmt: skip
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    request = AutoRequest(
        source=source, out=out or WORKSPACE / f"{source.name}-auto", menu=menu, device=device, dtype=dtype, **rest
    )  # fmt: skip
    goal = Goal(gate=gate, most=most, tries=tries, judging={"data": data, "max_tokens": max_tokens})
    plan = refused_here(request, goal, opened)
    if dry_run:
        _dry_run(opened, plan, menu, goal, as_json)
        return
    judges = None if data is None else Judges(source.path, data, gate, max_tokens, device, tries)
    say_where(source, device, dtype)
    print(_goal_text(goal, reader), file=sys.stderr)
    with Shown(quiet=as_json) as shown:
        found = search(
            request, goal, judges.judge(shown) if judges else None, shown, vet=judges.vet if judges else unvetted
        )  # fmt: skip
    kept = judges.keep(found) if judges else None
    _print(found, gate, time.monotonic() - started, as_json)
    if report is not None:
        _write_page(report, found, gate, source.name)
    if kept:
        print(f"note: {kept}", file=sys.stderr)
    _exit(found, goal)


# ---- what is asked for ---------------------------------------------------------------------------------


def asked_for(
    source: Source, target: str | None, format_: str | None, context: int | None, num_bytes: str | None, menu: Menu,
    trust: bool,
) -> tuple[StreamedModel, Menu, int | None, str | None]:  # fmt: skip
    """The opened model, what may be chosen, bytes at most, and which reader it is for."""
    from compress import stage
    from compress.model import StreamedModel
    from compress.prune.search import size_of

    if target is None and (format_ is not None or context is not None):
        raise ConfigError(f"--{'format' if format_ else 'context'} is about a machine; name one with --target")
    model = StreamedModel.open(source.path, trust_remote_code=trust)
    stage.refuse_quantized(model)
    most, reader = None, None
    if target is not None:
        from exporters.answer import LAYOUTS, codes_for
        from exporters.export import format_of, target_named

        machine = target_named(target)
        reader = format_of(format_ or ("hf" if "hf" in machine.formats else None), machine)
        most = _room(model, machine, reader, context)
        if reader != "hf":  # its exporter takes one scheme of codes and leaves the others as they are
            codes = codes_for(model, reader)
            if menu.lm_head:
                raise ConfigError(f"--lm-head: {reader} takes the output matrix in float16; leave --lm-head out")
            menu = replace(menu, int4=(codes.group_size,), symmetric=codes.symmetric or menu.symmetric, int8=False)
            assert LAYOUTS[reader].wants(codes) is None
        reader = f"{target} ({reader})"
    if num_bytes is not None:
        asked = size_of(num_bytes, "--bytes")
        most = asked if most is None else min(asked, most)
    return model, menu, most, reader


def _room(model: StreamedModel, machine: Any, reader: str, context: int | None) -> int:
    """Bytes of a folder's weights that the machine has room for, beside caches, activations and the runtime."""
    from compress import stage
    from compress.plan import LayerPlan
    from compress.quantize.choices import bytes_outside
    from exporters.export import context_for
    from exporters.sizing.inventory import read_model
    from exporters.sizing.predict import Plan, native_kv_bits, size

    inventory = read_model(model.checkpoint.path)
    tokens = context_for(inventory, machine, context)
    sizing = size(
        inventory, Plan(format=reader, context=tokens, num_bits=16, kv_bits=native_kv_bits(reader)), machine
    )  # fmt: skip
    linears = sizing.usable - (sizing.run_peak - sizing.decoder_linears)
    _, inside = stage.names_of(model)
    return linears + bytes_outside(model, set(LayerPlan.dense(inside)))


def refused_here(request: AutoRequest, goal: Goal, model: StreamedModel) -> LayerPlan:
    """What would be refused once the work has begun, before it; the plan of what is chosen for."""
    from compress.quantize.auto_stage import base_plan
    from compress.search import check_budget

    plan = base_plan(request, model)
    check_budget(request, goal, model, plan)
    return plan


def _goal_text(goal: Goal, reader: str | None) -> str:
    gate = "the best" if goal.gate is None else f"the smallest that keeps {goal.gate:.1%}"
    most = "" if goal.most is None else f" of at most {goal.most / 1e6:.2f} MB"
    return f"goal: {gate}{most}{f', for {reader}' if reader else ''}"


def _dry_run(model: StreamedModel, plan: LayerPlan, menu: Menu, goal: Goal, as_json: bool) -> None:
    """Sizes of what could be made, from headers; which of it is best, the run measures."""
    from compress import stage
    from compress.plan import outside_blocks
    from compress.quantize.choices import bytes_outside
    from compress.quantize.menu import kind, num_bytes

    shapes = stage.shapes_of(model, plan)
    outside = bytes_outside(model, set(shapes))
    options = {name: {kind(o): num_bytes(o, shape) for o in menu.options(shape[1])} for name, shape in shapes.items()}
    inside = [found for name, found in options.items() if not outside_blocks(name)]
    behind = [found for name, found in options.items() if outside_blocks(name)]  # where it may, it stays in float16

    def uniform(name: str) -> int:
        head = sum(found["float16" if "float16" in found else name] for found in behind)
        return outside + head + sum(found[name] for found in inside)

    common = [name for name in inside[0] if all(name in found for found in inside)]
    value = {
        "linears": len(shapes),
        "outside_bytes": outside,
        "least_bytes": outside + sum(min(found.values()) for found in options.values()),
        "most_bytes": outside + sum(max(found.values()) for found in options.values()),
        "uniform_bytes": {name: uniform(name) for name in common},
        "goal": {"gate": goal.gate, "most_bytes": goal.most},
    }
    if as_json:
        print(json.dumps(value, indent=2))
        return
    print(f"{_goal_text(goal, None)}\n{len(shapes)} linears are chosen for; {outside / 1e6:.2f} MB are not quantized")
    for name, size in value["uniform_bytes"].items():  # type: ignore[attr-defined]
        print(f"  all {name}: {size / 1e6:.2f} MB")
    print("what lies between them is measured by the run, which makes and judges "
          f"{'one artifact' if goal.gate is None else f'at most {goal.tries} artifacts'}")  # fmt: skip


# ---- what is said --------------------------------------------------------------------------------------


def to_json(found: Found, gate: float | None, seconds: float) -> dict[str, Any]:
    """What `--json` prints."""
    choices = found.choices
    return {
        "out": str(found.out),
        "wall_seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "source_bytes": found.source_bytes,
        "out_bytes": found.best.num_bytes if found.best else None,
        "tensors_verified": found.verified,
        "gate": gate,
        "passes": found.best.judged.passes if found.best and found.best.judged and gate is not None else None,
        "tried": [one.to_json() for one in found.tried],
        "frontier": [_point(c) for c in choices.frontier()] if choices else [],
        "uniform": {name: _point(c) for name, c in choices.uniform().items()} if choices else {},
        "notes": found.notes,
        "record": found.record,
    }


def _point(choice: Choice) -> dict[str, float]:
    return {"bytes": choice.num_bytes, "predicted_kl": choice.kl}


def _print(found: Found, gate: float | None, seconds: float, as_json: bool) -> None:
    if as_json:
        print(json.dumps(to_json(found, gate, seconds), indent=2))
        return
    out = console()
    for note in found.notes:
        out.print(note, soft_wrap=True)
    if found.best is None or found.choices is None:
        out.print(f"wrote {found.out}/", soft_wrap=True)
        return
    out.print(_table(found))
    counts = {name: found.best.choice.labels.count(name) for name in dict.fromkeys(found.best.choice.labels)}
    said = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    out.print(f"chosen, in sets of linears that share an input: {said}; {found.record['format']}", soft_wrap=True)
    out.print(
        f"wrote {found.out}/  {found.best.num_bytes / 1e6:.2f} MB (was {found.source_bytes / 1e6:.2f} MB); verified "
        f"{found.verified} tensors; {seconds_text(seconds)}, peak memory {peak_memory_bytes() / 2**20:.0f} MiB",
        soft_wrap=True,
    )
    if found.best.judged is not None:
        out.print(verdict_text(found.best.judged, gate), soft_wrap=True)
    out.print(f"next: {judging_command(found.out)}", soft_wrap=True)


def verdict_text(judged: Judged, gate: float | None) -> str:
    """One sentence: what is kept, and whether that is enough."""
    kept = f"recovery {judged.recovery:.2%} (between {judged.lower:.2%} and {judged.upper:.2%}), KL {judged.kl:.4f}"
    if gate is None:
        return kept
    if judged.passes:
        return f"PASS: {kept}; the gate is {gate:.1%}"
    return f"misses the gate of {gate:.1%} by {100 * (gate - judged.lower):.2f} points at its lower bound: {kept}"


def _table(found: Found) -> Any:
    """Size against divergence: what was made, uniform artifacts, and the frontier."""
    from rich.table import Table

    assert found.choices is not None
    rows: list[tuple[int, str, str, str, str]] = []
    for name, choice in found.choices.uniform().items():
        rows.append((choice.num_bytes, f"all {name}", f"{choice.kl:.4f}", "", ""))
    made = {one.choice.num_bytes: one for one in found.tried}
    shown = {*made, *(choice.num_bytes for choice in found.choices.uniform().values())}
    for choice in found.choices.frontier(9):
        if choice.num_bytes not in shown:
            rows.append((choice.num_bytes, "chosen", f"{choice.kl:.4f}", "", ""))
    for size, one in made.items():
        judged = one.judged
        kl, kept = (f"{judged.kl:.4f}", f"{judged.recovery:.2%} ({judged.lower:.2%})") if judged else ("", "")
        name = "made" if one is found.best else "made, not kept"
        rows.append((size, name, f"{one.choice.kl:.4f}", kl, kept))
    table = Table(title="size against KL divergence, nats a token", title_justify="left")
    for column in ("MB", "what", "predicted", "judged", "recovery (at least)"):
        table.add_column(column, justify="left" if column == "what" else "right", no_wrap=True)
    for size, *cells in sorted(rows):
        table.add_row(f"{size / 1e6:.2f}", *cells)
    return table


def _write_page(page: Path, found: Found, gate: float | None, name: str) -> None:
    from compress.cli.auto_page import to_html
    from compress.files import write_bytes_atomically

    write_bytes_atomically(page, to_html(to_json(found, gate, 0.0), f"{name}, bits where they count"))
    print(f"wrote {page}", file=sys.stderr)


def _exit(found: Found, goal: Goal) -> None:
    """Exit code 3 when a gate was asked for and what was made does not pass."""
    best = found.best
    if goal.gate is None or best is None or best.judged is None or best.judged.passes:
        return
    why = " within the bytes that there are" if goal.most is not None else ""
    raise GateFailed(
        f"no artifact passes{why}: the best {verdict_text(best.judged, goal.gate)}; it lies in {found.out}"
    )
