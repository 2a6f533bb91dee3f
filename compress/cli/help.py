"""How `--help` is laid out: options in groups, and an example of every command."""

from __future__ import annotations

from typing import Any

import click

# What many commands have, by the parameter's name; the others are the command's own.
_GROUPS = {
    "Text": ("calib", "samples", "self_samples", "seq_len", "data", "mix", "tokens", "skip_special"),
    "Computing": (
        "seed", "device", "dtype", "teacher_dtype", "micro_batch", "trust_remote_code", "checkpointing", "compile",
        "engine", "compress_gradients", "checkpoint_minutes", "checkpoint_steps", "cache_folder", "no_cache", "runtime",
        "graphs",
    ),
    "Output": ("out", "force", "resume", "report", "tensorboard", "plot", "dry_run", "as_json", "yes", "help"),
}  # fmt: skip
OWN = "Options"

EXAMPLES = {
    "run": "compress run orin-awq --model MODEL --set awq.calib=notes.txt --set evaluate.data=held_out.txt",
    "init": "compress init orin-awq --model MODEL --calib notes.txt --data held_out.txt",
    "awq": "compress awq MODEL --group-size 64 --calib notes.txt --effort best",
    "int8": "compress int8 MODEL --scheme w8a8 --calib notes.txt",
    "auto": "compress auto MODEL --gate 0.98 --calib notes.txt --data held_out.txt --report auto.html",
    "prune": "compress prune MODEL --depth 2 --intermediate 0.25",
    "teach": "compress teach --teacher MODEL --data notes.txt --tokens 10000000",
    "distill": "compress distill --student artifacts/SMALL --data notes.txt --watch other.txt",
    "export": "compress export artifacts/NAME --target orin-nano --context 2048",
    "fit": "compress fit MODEL --target orin-nano",
    "targets": "compress targets --json",
    "evaluate": "compress evaluate artifacts/NAME --data held_out.txt --gate 0.98 --report report",
    "bench": "compress bench artifacts/NAME MODEL --prompt-len 512 --new-tokens 128",
    "generate": 'compress generate artifacts/NAME "Once upon a time" --max-new-tokens 64',
    "inspect": "compress inspect artifacts/NAME --verify",
    "card": "compress card artifacts/NAME -o README.md",
    "status": "compress status",
    "log": "compress log",
    "gc": "compress gc artifacts/OLD --yes",
    "doctor": "compress doctor --json",
}


class Command(click.Command):
    """A command whose options are listed in groups, its own first, and whose help ends in an example.

    click keeps a command's help option as the first caller had it, so its names are set here, for all callers.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        settings.setdefault("context_settings", {"help_option_names": ["-h", "--help"]})
        super().__init__(*args, **settings)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {OWN: [], **{title: [] for title in _GROUPS}}
        for parameter in self.get_params(ctx):
            record = None if isinstance(parameter, click.Argument) else parameter.get_help_record(ctx)
            if record is not None:
                title = next((t for t, names in _GROUPS.items() if parameter.name in names), OWN)
                groups[title].append(record)
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        example = EXAMPLES.get(self.name or "")
        if example is not None:
            with formatter.section("Example"):
                formatter.write(f"{'':>{formatter.current_indent}}{example}\n")  # on one line, to be copied
