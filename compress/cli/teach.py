"""`compress teach`: options, progress and the closing summary. The work is in `compress.distill.teach`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import click

from compress import advice
from compress.cli.help import Command
from compress.cli.lessons import lessons
from compress.cli.progress import Shown, peak_memory_bytes, seconds_text
from compress.errors import ConfigError
from compress.tell import SILENT


@click.command("teach", cls=Command)
@click.option("--teacher", metavar="MODEL", help="Who teaches [default: the newest artifact's original].")
@click.option(
    "--top-k", type=click.IntRange(1, 8), default=4, show_default=True, help="Likeliest tokens, kept exactly."
)
@click.option("--tail", type=click.IntRange(1, 64), default=8, show_default=True, help="Tokens drawn from the rest.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to make [default: artifacts/NAME-taught].")
@lessons(
    seed="Of the draws, and of sampling from the teacher.",
    resume="Go on from the last finished part.",
)
def command(
    teacher: str | None,
    data: tuple[str, ...],
    mix: str | None,
    out: Path | None,
    as_json: bool,
    device: str,
    dtype: str,
    **rest: Any,
) -> None:
    """Write what a teacher predicts over a text, for `compress distill --cache`.

    About 50 bytes a token: the likeliest tokens exactly and a sample of the others, so that what a student learns is
    right on average. A student can then be trained without the teacher in memory, and several from one cache.
    """
    started = time.monotonic()
    from compress.devices import described, pick_device, pick_dtype
    from compress.distill.data import Mix
    from compress.distill.teach import TeachRequest, teach
    from compress.workspace import WORKSPACE, resolve

    if not data:
        raise ConfigError("no text to teach; pass --data FILE, --data hf:DATASET or --data self")
    source = resolve(teacher, out=out, force=rest["force"])
    device = pick_device(device)
    request = TeachRequest(
        teacher=source,
        out=out or WORKSPACE / f"{source.name}-taught",
        data=Mix.of(data, mix),
        device=device,
        dtype=pick_dtype(dtype, device),
        **rest,
    )
    first = int(os.environ.get("RANK", "0")) == 0
    with Shown(quiet=as_json or not first) as shown:
        if first:
            shown.say(f"teacher: {source.said}\ncomputed on: {described(device)}, {request.dtype}")
        outcome = teach(request, tell=shown if first else SILENT)
    if not first:
        return
    seconds = time.monotonic() - started
    if as_json:
        found = {
            "out": str(outcome.out),
            "wall_seconds": round(seconds, 3),
            "tokens": outcome.tokens,
            "token_bytes": outcome.token_bytes,
            "record": outcome.record,
        }
        print(json.dumps(found, indent=2))
        return
    print(
        f"wrote {outcome.out}/  {outcome.tokens:,} tokens, {outcome.token_bytes} bytes each; {seconds_text(seconds)}, "
        f"peak memory {peak_memory_bytes() / 2**20:.0f} MiB"
    )
    print(f"next: {advice.command('distill', '--teacher', source.path, '--cache', outcome.out)}")
