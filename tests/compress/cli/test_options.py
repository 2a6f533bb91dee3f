"""Options that several commands share."""

import click
import pytest

from compress.cli import awq, calibrated, distill, int8, teach
from compress.cli.calibrated import _OPTIONS as CALIBRATED
from compress.cli.lessons import _OPTIONS as LESSONS
from compress.cli.options import Table


def options(command: click.Command) -> dict[str, click.Parameter]:
    return {str(p.name): p for p in command.params if isinstance(p, click.Option)}


@pytest.mark.parametrize(
    ("one", "other", "table"),
    [(awq.command, int8.command, CALIBRATED), (distill.command, teach.command, LESSONS)],
    ids=["calibrated", "lessons"],
)
def test_shared_options_are_the_same_but_for_their_help(one: click.Command, other: click.Command, table: Table) -> None:
    mine, theirs = options(one), options(other)
    shared = {str(p.name) for p in click.command()(_added(table)).params}
    assert shared <= mine.keys() & theirs.keys()
    for name in shared:
        facts = [(p.opts, p.secondary_opts, repr(p.type), p.default, p.multiple) for p in (mine[name], theirs[name])]  # type: ignore[attr-defined]
        assert facts[0] == facts[1], name


def _added(table: Table):  # type: ignore[no-untyped-def]
    def command() -> None: ...

    for option in table.values():
        command = option()(command)
    return command


def test_another_help_text_is_only_taken_for_an_option_that_is_there() -> None:
    with pytest.raises(AssertionError):
        calibrated.calibrated(sead="Of the draws.")
