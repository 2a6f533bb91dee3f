"""The command line. Commands load on use, so that `compress --help` answers at once.

Exit codes: 0 done, 1 the input or a file is at fault, 2 wrong usage, 3 the gate failed, 4 the gate is inconclusive,
130 interrupted.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from compress import __version__
from compress.errors import CompressError
from compress.siblings import check_siblings

# command -> (module, first line of its help)
_COMMANDS = {
    "awq": (
        "compress.cli.awq",
        "Quantize to AWQ INT4: an AutoAWQ folder that vLLM, SGLang and transformers load.",
    ),
    "teach": (
        "compress.cli.teach",
        "Write what a teacher predicts over a text, to train students from.",
    ),
    "distill": (
        "compress.cli.distill",
        "Train a pruned or quantized student to predict what its teacher predicts.",
    ),
    "export": (
        "compress.cli.export",
        "Turn an artifact into what an A100, an Orin or a CPU runs, sized and verified.",
    ),
    "fit": (
        "compress.cli.fit",
        "Will a model fit a machine, and how fast might it be? Before anything is quantized.",
    ),
    "targets": (
        "compress.cli.targets",
        "List the machines, with their memory, speed and formats.",
    ),
    "evaluate": (
        "compress.cli.evaluate",
        "Judge an artifact against its original; the accuracy gate for CI.",
    ),
    "bench": (
        "compress.cli.bench",
        "Measure first-token time, time between tokens and memory speed, in turns.",
    ),
    "doctor": (
        "compress.cli.doctor",
        "Check this machine and installation; each lack comes with the command that mends it.",
    ),
    "generate": (
        "compress.cli.generate",
        "Continue a prompt with a model, an artifact or an export.",
    ),
    "inspect": (
        "compress.cli.inspect",
        "Show a model or artifact: parameters, bytes, scheme, lineage, reports.",
    ),
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(_COMMANDS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        # The one place where our errors become exit codes; anything else is a bug and keeps its traceback.
        try:
            check_siblings()
            return super().invoke(ctx)
        except CompressError as e:
            click.echo(f"error: {e}", err=True)
            sys.exit(e.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; the same command goes on from the last finished block", err=True)
            sys.exit(130)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="compress")
def main() -> None:
    """Make a language model fit an A100 server or a Jetson Orin, and prove that it is still right.

    \b
      compress awq --bits 4            quantize
      compress distill --data TEXT     bring a pruned model back
      compress export --target orin    package for the device
      compress evaluate                prove it
      compress inspect                 see what was made

    Each command takes the newest artifact of ./artifacts, or the bundled reference model if there is none.
    """
