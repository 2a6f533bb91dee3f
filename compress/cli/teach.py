"""`compress teach`: options, progress and the closing summary. The work is in `compress.distill.teach`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import click

from compress.cli.progress import Shown, peak_memory_bytes, seconds_text
from compress.errors import ConfigError
from compress.tell import SILENT


@click.command("teach")
@click.option("--teacher", metavar="MODEL", help="Who teaches [default: the newest artifact's original].")
@click.option(
    "--data",
    multiple=True,
    metavar="TEXT",
    help="Text to say something about: a file (.txt, .jsonl, .parquet; .gz, .xz), hf:DATASET[:split[:column]], or "
    "`self` (sampled from the teacher). Several may be given.",
)
@click.option("--mix", metavar="W,W,...", help="Shares of the --data sources, in their order [default: equal].")
@click.option("--tokens", type=click.IntRange(1), help="Tokens [default: all of the text].")
@click.option("--seq-len", type=click.IntRange(2), default=512, show_default=True, help="Tokens in a row.")
@click.option(
    "--top-k", type=click.IntRange(1, 8), default=4, show_default=True, help="Likeliest tokens, kept exactly."
)
@click.option("--tail", type=click.IntRange(1, 64), default=8, show_default=True, help="Tokens drawn from the rest.")
@click.option("--temperature", type=click.FloatRange(0.1, 10), default=1.0, show_default=True, help="Of the softmax.")
@click.option("--isolate-documents", "isolate", is_flag=True, help="Read the documents of a row apart.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws, and of sampling from the teacher.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda[:N]; auto: a GPU if there is one.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True,
              help="Of matrix products (auto: bfloat16 on a GPU).")  # fmt: skip
@click.option("--teacher-dtype", type=click.Choice(["auto", "float32", "bfloat16", "w8a16"]), default="auto",
              show_default=True, help="How the teacher is held; auto: in INT8 when memory is short.")  # fmt: skip
@click.option("--micro-batch", type=click.IntRange(1), help="Rows a pass [default: as many as make a good pass].")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to make [default: artifacts/NAME-taught].")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on from the last finished part.")
@click.option("--trust-remote-code", is_flag=True, help="Run the Python code that the model's folder ships.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
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
    source = resolve(teacher)
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
    print(f"next: compress distill --teacher {source.path} --cache {outcome.out}")
