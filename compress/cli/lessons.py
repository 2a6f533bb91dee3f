"""Options that the commands with a teacher share."""

from __future__ import annotations

from functools import partial

import click

from compress.cli.options import RUN, Table, adder

_OPTIONS: Table = {
    "data": partial(
        click.option,
        "--data",
        multiple=True,
        metavar="TEXT",
        help="Text: a file (.txt, .jsonl, .parquet; .gz, .xz), hf:DATASET[:split[:column]], or `self` (sampled from "
        "the teacher). Several may be given.",
    ),
    "mix": partial(
        click.option, "--mix", metavar="W,W,...", help="Shares of the --data sources, in their order [default: equal]."
    ),
    "tokens": partial(
        click.option, "--tokens", type=click.IntRange(1), help="Tokens to read [default: all of the text]."
    ),
    "seq_len": partial(
        click.option, "--seq-len", type=click.IntRange(2), default=512, show_default=True, help="Tokens in a row."
    ),
    "micro_batch": partial(
        click.option,
        "--micro-batch",
        type=click.IntRange(1),
        help="Rows a pass [default: as many as make a good pass].",
    ),
    "temperature": partial(
        click.option,
        "--temperature",
        type=click.FloatRange(0.1, 10),
        default=1.0,
        show_default=True,
        help="Of the softmax.",
    ),
    "isolate": partial(
        click.option,
        "--isolate-documents",
        "isolate",
        is_flag=True,
        help="Read the documents of a row apart.",
    ),
    "seed": partial(click.option, "--seed", type=int, default=0, show_default=True, help="Of every draw."),
    "device": partial(
        click.option,
        "--device",
        default="auto",
        show_default=True,
        help="cpu, cuda[:N]; auto: a GPU if there is one.",
    ),
    "dtype": partial(
        click.option,
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16"]),
        default="auto",
        show_default=True,
        help="Of matrix products (auto: bfloat16 on a GPU).",
    ),
    "teacher_dtype": partial(
        click.option,
        "--teacher-dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "w8a16"]),
        default="auto",
        show_default=True,
        help="How the teacher is held; auto: in INT8 when memory is short.",
    ),
    **RUN,
    "trust_remote_code": partial(RUN["trust_remote_code"], help="Run the Python code that the models' folders ship."),
}

lessons = adder(_OPTIONS)
