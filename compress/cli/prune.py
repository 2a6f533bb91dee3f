"""`compress prune`: options, progress and the closing summary. The work is in `compress.prune.prune_stage`."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compress.cli.calibrated import model_of, print_json
from compress.cli.help import Command
from compress.cli.next import judge
from compress.cli.options import MODEL, adder
from compress.cli.progress import Shown, peak_memory_bytes, seconds_text
from compress.errors import ConfigError
from compress.files import write_bytes_atomically

if TYPE_CHECKING:
    from compress.model import StreamedModel
    from compress.prune.decide import Asked
    from compress.stage import Outcome
    from exporters.sizing.predict import Sizing

AMOUNTS = ("depth", "intermediate", "heads", "kv_heads", "hidden")
_AMOUNT = "whole number, or share below 1"


@click.command("prune", cls=Command)
@click.argument("model", required=False)
@click.option("--depth", metavar="N|SHARE", help=f"Decoder blocks to remove: {_AMOUNT}.")
@click.option("--intermediate", metavar="N|SHARE", help="Neurons of every MLP to remove.")
@click.option("--heads", metavar="N|SHARE", help="Query heads to remove, evenly from the key-value groups.")
@click.option("--kv-heads", metavar="N|SHARE", help="Key-value heads to remove, with their query heads.")
@click.option("--hidden", metavar="N|SHARE", help="Channels of the hidden state to remove.")
@click.option("--params", metavar="SIZE", help="Goal: at most so many parameters, such as 50M.")
@click.option("--bytes", "num_bytes", metavar="SIZE", help="Goal: at most so many bytes of weights, such as 2G.")
@click.option("--target", metavar="TARGET", help="Goal: fits this machine in 16 bits; `compress targets` lists them.")
@click.option("--context", type=click.IntRange(1), default=2048, show_default=True, help="Tokens, for --target.")
@click.option(
    "--max-kl", type=float, help="KL divergence, nats a token, above which you are told; alone it is the goal."
)
@click.option("--candidates", type=click.IntRange(1), default=10, show_default=True, help="Shapes judged for a goal.")
@click.option("--repair/--no-repair", default=True, show_default=True, help="Refit what reads the units that stay.")
@adder(MODEL)()
@click.option("--calib", metavar="TEXT", help="Calibration text, as for `compress awq`.")
@click.option("--samples", type=click.IntRange(1), default=128, show_default=True, help="Calibration rows.")
@click.option("--seq-len", type=click.IntRange(1), default=512, show_default=True, help="Tokens in a row.")
@click.option(
    "--self-samples",
    type=click.IntRange(0),
    help="Rows sampled from the model itself, fitted to and judged on beside the text [default: as many as of the text "
    "(to 1 GB of weights, 4 GB on a GPU)].",
)
@click.option(
    "--watch", metavar="TEXT", help="A second text: what goes is judged on it as well, nothing is fitted to it."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of sampling from the model.")
@click.option("--device", default="auto", show_default=True, help="Where blocks are computed: cpu, cuda[:N], auto.")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True,
    help="Arithmetic of the forward passes.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what the amounts would leave, and write nothing.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder to make [default: artifacts/NAME-prune-...]."
)
@click.option("--report", type=click.Path(path_type=Path), help="Page to write: what blocks, heads and neurons cost.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on with a run that was killed.")
@click.option("--trust-remote-code", is_flag=True, help="Run the Python code that the model's folder ships.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def command(
    model: str | None, out: Path | None, as_json: bool, dry_run: bool, report: Path | None, device: str, dtype: str,
    params: str | None, num_bytes: str | None, target: str | None, context: int, max_kl: float | None, **rest: Any,
) -> None:  # fmt: skip
    """Remove blocks, neurons, heads or hidden channels of MODEL, and refit what is left.

    Say how much of each goes, or a goal, for which shapes are tried. The result is an ordinary model folder.
    """
    started = time.monotonic()
    from compress.devices import described, pick_device, pick_dtype
    from compress.prune.prune_stage import PruneRequest, prune
    from compress.workspace import WORKSPACE

    source = model_of(
        model, out=None if dry_run else out, force=rest["force"], revision=rest.pop("revision"),
        adapter=rest.pop("adapter"), trust=rest["trust_remote_code"],
    )  # fmt: skip
    amounts = {name: rest.pop(name) for name in AMOUNTS}
    asked = asked_of(
        amounts, params=params, num_bytes=num_bytes, target=target, context=context, max_kl=max_kl,
        candidates=rest.pop("candidates"), sizes_only=dry_run,
    )  # fmt: skip
    if report is not None:
        check_page(report, source.path)
    print(f"model: {source.said}", file=sys.stderr)
    if dry_run:
        _dry_run(source.path, asked, target, context, rest["trust_remote_code"], as_json)
        return
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    print(f"computed on: {described(device)}, {dtype}", file=sys.stderr)
    place = out or WORKSPACE / f"{source.name}-prune-{label(amounts, params, num_bytes, target, max_kl)}"
    request = PruneRequest(
        source=source, out=place, asked=asked, max_kl=max_kl, device=device, dtype=dtype, **rest
    )  # fmt: skip
    with Shown(quiet=as_json) as shown:
        outcome = prune(request, shown)
    seconds = time.monotonic() - started
    if as_json:
        print_json(outcome, seconds)
    else:
        _print(outcome, seconds)
    if report is not None:
        from compress.cli.prune_page import to_html

        write_bytes_atomically(report, to_html(outcome.record, f"{source.name}, pruned"))
        print(f"wrote {report}", file=sys.stderr)


def check_page(page: Path, model: Path) -> None:
    """ConfigError, before any work, when the page cannot be written there."""
    from compress.output import check_apart

    if page.suffix != ".html" or page.is_dir():
        raise ConfigError(f"--report {page}: name the page to write, such as prune.html")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError('--report needs matplotlib, which is not installed; pip install "compress-toolkit[report]"')
    check_apart(page, {"the model": model}, "--report")
    if not os.access(page.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--report {page}: {page.parent} is no folder that can be written; choose another place")


def asked_of(
    amounts: Mapping[str, str | None], *, params: str | None, num_bytes: str | None, target: str | None, context: int,
    max_kl: float | None, candidates: int, sizes_only: bool = False,
) -> Asked:  # fmt: skip
    """What the options ask for. sizes_only: a target beside amounts is no goal, but what is sized."""
    from compress.prune.decide import Asked
    from compress.prune.search import size_of

    sized, explicit = params or num_bytes or target, any(amounts.values())
    return Asked(
        **amounts,
        params=size_of(params, "--params") if params else None,
        bytes=size_of(num_bytes, "--bytes") if num_bytes else None,
        target=f"{target} --context {context}" if target and not (sizes_only and explicit) else None,
        fits=_fits(target, context) if target else None,
        max_kl=None if sized or explicit else max_kl,
        candidates=candidates,
    )


def label(amounts: Mapping[str, str | None], *goal: Any) -> str:
    """What the folder is called after: the amounts, or the goal."""
    parts = [f"{name.replace('_', '-')}{value}" for name, value in amounts.items() if value]
    return "-".join(parts) or "-".join(str(value) for value in goal if value) or "nothing"


def _sized(config: Mapping[str, Any], target: str, context: int) -> Sizing:
    """Memory and speed of a model of that config.json on a machine, in 16 bits."""
    from exporters.export import format_of, target_named
    from exporters.sizing.inventory import read_model
    from exporters.sizing.predict import KV_BITS, Plan, size

    machine = target_named(target)
    chosen = format_of(None, machine)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(dict(config)))
        found = read_model(Path(folder))
    return size(found, Plan(format=chosen, context=context, batch=1, num_bits=16, kv_bits=KV_BITS[chosen][0]), machine)


def _fits(target: str, context: int) -> Callable[[Mapping[str, Any]], bool]:
    from exporters.export import target_named

    target_named(target)  # refused here, before any work
    return lambda config: _sized(config, target, context).fits


def _dry_run(folder: Path, asked: Asked, target: str | None, context: int, trust: bool, as_json: bool) -> None:
    from compress.model import StreamedModel
    from compress.prune.decide import bytes_per_number
    from compress.prune.prune_stage import refuse
    from compress.prune.shape import Counter, shape_of

    model = StreamedModel.open(folder, trust_remote_code=trust)
    refuse(model)
    asked.check(model)
    if asked.has_goal:
        _dry_goal(model, asked, target, context, as_json)
        return
    counter, old, new = Counter(model), shape_of(model), asked.shape(model)
    found: dict[str, Any] = {
        "before": {**old.to_json(), "parameters": counter.parameters(old)},
        "after": {**new.to_json(), "parameters": counter.parameters(new)},
        "bytes": round(counter.parameters(new) * bytes_per_number(model)),
    }
    if target:
        found["target"] = _sized(counter.config(new), target, context).to_json()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    before, after = found["before"]["parameters"], found["after"]["parameters"]
    print(f"{old.label()} -> {new.label()}: {before / 1e6:.1f} M -> {after / 1e6:.1f} M parameters "
          f"({after / before - 1:+.1%}), {found['bytes'] / 1e6:.1f} MB of weights; "
          "which ones go is measured by the run")  # fmt: skip
    if target:
        print(json.dumps(found["target"], indent=2))


def _dry_goal(model: StreamedModel, asked: Asked, target: str | None, context: int, as_json: bool) -> None:
    """The shapes that meet a goal, largest first; which of them is made, the run measures."""
    from compress.prune.decide import allowed_choices, bytes_per_number, candidates_of
    from compress.prune.shape import Counter, shape_of

    counter, old = Counter(model), shape_of(model)
    shapes = sorted(candidates_of(asked, model, allowed_choices(model)), key=counter.parameters, reverse=True)
    found: list[dict[str, Any]] = []
    for shape in shapes[: asked.candidates]:
        numbers = counter.parameters(shape)
        weights = round(numbers * bytes_per_number(model))
        one: dict[str, Any] = {**shape.to_json(), "parameters": numbers, "bytes": weights}
        if target:
            one["target"] = _sized(counter.config(shape), target, context).to_json()
        found.append(one)
    if as_json:
        print(json.dumps({"goal": asked.goal_text(), "meet_it": len(shapes), "largest": found}, indent=2))
        return
    print(
        f"{len(shapes)} shapes are smaller than {old.label()} ({counter.parameters(old) / 1e6:.1f} M parameters) and "
        f"meet {asked.goal_text()}; the run judges {min(len(shapes), asked.candidates)} of them. The largest:"
    )
    for shape, one in zip(shapes, found, strict=False):
        speed = one["target"]["predicted"]["decode_tokens_per_s"] if target else None
        fast = f", {speed[0]:g} to {speed[1]:g} tokens/s" if speed else ""
        print(f"  {shape.label()}: {one['parameters'] / 1e6:.1f} M parameters, {one['bytes'] / 1e6:.1f} MB{fast}")


def _print(outcome: Outcome, seconds: float) -> None:
    from compress.prune.kinds import by_text, held_text

    record = outcome.record
    search = record["search"]
    for one in search["tried"] if search else ():
        shape = "-".join(f"{key}{value}" for key, value in one["shape"].items())
        print(
            f"tried {shape}: {one['parameters'] / 1e6:.1f} M, KL {one['divergence']:.4f} "
            f"({one['predicted']:.4f} added up{by_text(one['by_text'])})"
        )
    print(f"KL to the original on rows held out: {held_text(record['divergence'])}")
    removed = record["removed_blocks"]
    count = record["parameters"]
    print(f"blocks removed: {', '.join(map(str, removed)) or 'none'}; {count['before'] / 1e6:.1f} M -> "
          f"{count['after'] / 1e6:.1f} M parameters ({count['after'] / count['before'] - 1:+.1%})")  # fmt: skip
    for note in outcome.notes:
        print(note)
    print(f"wrote {outcome.out}/  {outcome.out_bytes / 1e6:.1f} MB (was {outcome.source_bytes / 1e6:.1f} MB); verified "
          f"{outcome.verified} tensors; {seconds_text(seconds)}, "
          f"peak memory {peak_memory_bytes() / 2**20:.0f} MiB")  # fmt: skip
    print(f"next: {judge(outcome.out)}")
