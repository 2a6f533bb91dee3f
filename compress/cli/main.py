"""The command line. Commands load on use, so that `compress --help` answers at once.

Exit codes: 0 done, 1 the input, a file or the machine is at fault, 2 wrong usage, 3 the gate failed, 4 the gate is
inconclusive, 70 a bug of ours, 130 interrupted. COMPRESS_DEBUG=1 shows every traceback.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import click

from compress import __version__, threads
from compress.cli.terminal import plain_streams, printable
from compress.errors import CompressError, Interrupted, out_of_room, reason
from compress.siblings import check_siblings

# command -> (module, first line of its help)
_COMMANDS = {
    "run": (
        "compress.cli.run",
        "Run a recipe: all its stages in a row, checked first, resumable, one verdict.",
    ),
    "init": (
        "compress.cli.init",
        "Write a recipe to change and run, from a ready one.",
    ),
    "awq": (
        "compress.cli.awq",
        "Quantize to AWQ INT4: an AutoAWQ folder that vLLM, SGLang and transformers load.",
    ),
    "int8": (
        "compress.cli.int8",
        "Quantize to INT8, W8A8 or W8A16: a compressed-tensors folder for vLLM, SGLang and transformers.",
    ),
    "prune": (
        "compress.cli.prune",
        "Remove blocks, neurons, heads or channels, chosen by measured damage, and refit the rest.",
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
    "status": (
        "compress.cli.status",
        "List the workspace's artifacts: what they are, size, scores, verdicts, what could go.",
    ),
    "log": (
        "compress.cli.log",
        "Show who was made from whom, as a tree.",
    ),
    "gc": (
        "compress.cli.gc",
        "List, or with --yes remove, what the workspace no longer needs.",
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
        # The one place where errors become sentences and exit codes.
        try:
            threads.configure()  # before any command loads torch
            check_siblings()
            with plain_streams(), _first_speaks():
                result = super().invoke(ctx)
            sys.stdout.flush()  # a full disk behind a redirection is met here, not on the way out
            return result
        except (Exception, KeyboardInterrupt) as e:
            if isinstance(e, _CLICKS_OWN) or isinstance(e, BrokenPipeError) or _debugging(e):
                raise
            text, code = told(e)
            click.echo(text, err=True)
            sys.exit(code)


@contextmanager
def _first_speaks() -> Iterator[None]:
    """Of several processes that torchrun started, the others say nothing but what went wrong with them."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0":
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


_CLICKS_OWN = (click.ClickException, click.Abort, click.exceptions.Exit)


def _debugging(error: BaseException) -> bool:
    return bool(os.environ.get("COMPRESS_DEBUG")) and not isinstance(error, (CompressError, KeyboardInterrupt))


def told(error: BaseException) -> tuple[str, int]:
    """What the user is told of an exception, in one line that no name in it can break, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        note = f"; {error}" if isinstance(error, Interrupted) else ""
        return f"interrupted{note}", 130
    full = out_of_room(error)
    if isinstance(error, CompressError):
        text, code = str(error), error.exit_code
    elif full is not None:
        text, code = str(full), full.exit_code
    elif isinstance(error, OSError) or str(error).startswith("Symlink loop"):  # a RuntimeError of Path.resolve
        text, code = f"{reason(error)}; the file system refused it, mend that and run the same command again", 1
    else:
        text, code = _bug(error), 70
    return f"error: {printable(' '.join(text.split()), keep='')}", code


def _bug(error: BaseException) -> str:
    """The sentence for an exception that nobody foresaw; its traceback is kept where the user can send it from."""
    text = f"this is a bug of compress ({type(error).__name__}: {reason(error)})"
    try:
        handle, path = tempfile.mkstemp(prefix="compress-bug-", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as f:
            f.write(f"compress {__version__}, {sys.version}\n{' '.join(sys.argv)}\n\n")
            traceback.print_exception(error, file=f)
    except OSError:
        return f"{text}; run it again with COMPRESS_DEBUG=1 and report the traceback"
    return f"{text}; please report it with {path}, which holds the traceback"


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
