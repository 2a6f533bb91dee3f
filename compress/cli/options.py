"""Options that several commands have: written once, with another help text where a command means more by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

# What makes an option, by its name: `partial(click.option, "--seed", ...)`, which takes another `help`.
Table = Mapping[str, Callable[..., Callable[[Any], Any]]]


# Of every command that writes a folder and can go on after a kill; the last ones of its table.
RUN: Table = {
    "force": partial(click.option, "--force", is_flag=True, help="Replace OUT if it exists."),
    "resume": partial(
        click.option,
        "--resume/--no-resume",
        default=True,
        show_default=True,
        help="Go on with a run that was killed.",
    ),
    "trust_remote_code": partial(
        click.option,
        "--trust-remote-code",
        is_flag=True,
        help="Run the Python code that the model's folder ships.",
    ),
    "json": partial(click.option, "--json", "as_json", is_flag=True, help="Print the result as one JSON object."),
}


# Of every command that makes something of a model.
MODEL: Table = {
    "adapter": partial(
        click.option,
        "--adapter",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        help="LoRA adapter of MODEL, a folder that peft saved; merged into a model of its own first.",
    ),
    "revision": partial(click.option, "--revision", help="Branch, tag or commit of a hub model."),
}


def adder(table: Table) -> Callable[..., Callable[[F], F]]:
    """A decorator for click commands that adds all options of a table, in its order: `@lessons(seed="Of the draws.")`.

    Its keywords are other help texts, by the option's name.
    """

    def decorator(**helps: str) -> Callable[[F], F]:
        assert helps.keys() <= table.keys()

        def add(command: F) -> F:
            for name, option in reversed(list(table.items())):
                command = (option(help=helps[name]) if name in helps else option())(command)
            return command

        return add

    return decorator
