"""The command line. Commands load on use, so that `compress --help` answers at once.

Exit codes: 0 done, 1 the input, a file or the machine is at fault, 2 wrong usage, 3 the gate failed, 4 the gate is
inconclusive, 70 a bug of ours, 130 interrupted. COMPRESS_DEBUG=1 shows every traceback.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import click

from compress import __version__, threads
from compress.cli.listening import Listening, called, listening
from compress.cli.terminal import plain_streams, printable
from compress.errors import CompressError, Interrupted, out_of_room, reason
from compress.siblings import check_siblings

# title -> command -> (module, first line of its help)
_GROUPS = {
    "All in a row": {
        "run": (
            "compress.cli.run",
            "Run a recipe: all its stages in a row, checked first, resumable, one verdict.",
        ),
        "init": (
            "compress.cli.init",
            "Write a recipe to change and run, from a ready one.",
        ),
    },
    "Make a model smaller": {
        "awq": (
            "compress.cli.awq",
            "Quantize to AWQ INT4: an AutoAWQ folder that vLLM, SGLang and transformers load.",
        ),
        "int8": (
            "compress.cli.int8",
            "Quantize to INT8, W8A8 or W8A16: a compressed-tensors folder for vLLM, SGLang and transformers.",
        ),
        "auto": (
            "compress.cli.auto",
            "Choose bits for each set of layers: the smallest artifact that passes the gate.",
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
    },
    "Ship it and prove it": {
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
        "generate": (
            "compress.cli.generate",
            "Continue a prompt with a model, an artifact or an export.",
        ),
    },
    "Look, and keep order": {
        "inspect": (
            "compress.cli.inspect",
            "Show a model or artifact: parameters, bytes, scheme, lineage, reports.",
        ),
        "card": (
            "compress.cli.card",
            "Describe an artifact on one page: size, bits a weight, scores, recipe, how to run it.",
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
    },
}
_COMMANDS = {name: found for group in _GROUPS.values() for name, found in group.items()}
# Options that stand before or after any command, and how many values each takes.
_EVERYWHERE = {"--quiet": 0, "-q": 0, "--log-json": 1, "--metrics": 1}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(_COMMANDS[cmd_name][0]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """A name that is none is answered with the nearest that is."""
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            near = "".join(f" Did you mean '{name}'?" for name in difflib.get_close_matches(args[0], _COMMANDS, 1))
            ctx.fail(f"No such command '{args[0]}'.{near}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, group in _GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name, text) for name, (_, text) in group.items()])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, everywhere_first(args))

    def invoke(self, ctx: click.Context) -> Any:
        # The one place where errors become sentences and exit codes.
        listener, code = None, 0
        try:
            threads.configure()  # before any command loads torch
            check_siblings()
            heard = (ctx.params.get("log_json"), ctx.params.get("metrics")) if _is_first() else (None, None)
            listener = Listening(*heard)
            with plain_streams(), _first_speaks(), listening(listener, quiet=bool(ctx.params.get("quiet"))):
                result = super().invoke(ctx)
            sys.stdout.flush()  # a full disk behind a redirection is met here, not on the way out
            return result
        except (Exception, KeyboardInterrupt, SystemExit) as e:
            code = _code(e)
            if isinstance(e, (SystemExit, *_CLICKS_OWN)) or isinstance(e, BrokenPipeError) or _debugging(e):
                raise
            text, code = told(e)
            if listener is not None:
                listener.hear("error", text=text)
            click.echo(text, err=True)
            sys.exit(code)
        finally:
            if listener is not None:
                listener.end(code)


def everywhere_first(args: list[str]) -> list[str]:
    """The arguments with those options in front that may stand before or after any command, up to a `--`."""
    front, rest, left = [], [], list(args)
    while left:
        arg = left.pop(0)
        if arg == "--":
            rest += [arg, *left]
            break
        takes = _EVERYWHERE.get(arg.partition("=")[0])
        if takes is None:
            rest.append(arg)
            continue
        front.append(arg)
        if takes and "=" not in arg and left:
            front.append(left.pop(0))
    return [*front, *rest]


def _code(error: BaseException) -> int:
    """The exit code of what click and commands raise to end."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return int(getattr(error, "exit_code", 1))


@contextmanager
def _first_speaks() -> Iterator[None]:
    """Of several processes that torchrun started, the others say nothing but what went wrong with them."""
    if _is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _is_first() -> bool:
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


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
@click.option("-q", "--quiet", is_flag=True, help="Show no progress and no notes on stderr; errors are shown.")
@click.option(
    "--log-json", type=click.Path(path_type=Path), metavar="FILE", help="Append the run's events, a JSON object a line."
)
@click.option(
    "--metrics", type=click.Path(path_type=Path), metavar="FILE", help="Write the run's counters for Prometheus."
)
@click.pass_context
def main(ctx: click.Context, /, **_: Any) -> None:
    """Make a language model fit an A100 server or a Jetson Orin, and prove that it is still right.

    \b
      compress awq --bits 4            quantize
      compress distill --data TEXT     bring a pruned model back
      compress export --target orin    package for the device
      compress evaluate                prove it
      compress run orin-awq            all of it, one verdict

    Each command takes the newest artifact of ./artifacts, or the bundled reference model if there is none. The options
    below may stand behind a command too.
    """
    called(ctx.invoked_subcommand or "")
