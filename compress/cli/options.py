"""Options that several commands have: written once, with another help text where a command means more by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

# What makes an option, by its name: `partial(click.option, "--seed", ...)`, which takes another `help`.
Table = Mapping[str, Callable[..., Callable[[Any], Any]]]


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
