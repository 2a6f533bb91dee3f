"""Names that a model chose reach the terminal as text."""

import io
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from compress.cli.console import Console
from compress.cli.terminal import plain_streams, printable

NASTY = "\x1b[31mred\x1b[0m [red]x[/red] [/nothing] \x07\x9b2J \u202eabc\u2066 \ud800 :smile:"


@given(st.text(st.characters(exclude_categories=())))
def test_nothing_that_a_terminal_acts_on_is_left(text: str) -> None:
    shown = printable(text)
    assert not any(ord(c) < 32 and c not in "\n\t" or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in shown)
    assert not any(c in shown for c in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    assert printable(shown) == shown


def test_ordinary_text_is_as_it_was() -> None:
    for text in ("model.layers.0.mlp", "über 日本語 🙂", "a\tb\nc", ""):
        assert printable(text) == text
    assert printable("a\nb\x1b", keep="") == "a\\u000ab\\u001b"


def test_what_is_printed_is_plain_and_rich_keeps_its_own_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.StringIO()
    monkeypatch.setattr(sys, "stdout", raw)
    with plain_streams():
        print(NASTY)
        table = Table()
        table.add_column("layer")
        table.add_row(NASTY)
        console = Console(width=200, force_terminal=True, highlight=False)
        console.print(table)
        console.print(NASTY, soft_wrap=True)
        console.print("bold", style="bold")
    assert sys.stdout is raw
    shown = raw.getvalue()
    assert "\x1b[1mbold\x1b[0m" in shown, "a style of ours"
    for piece in ("\x1b[31m", "\x07", "\x9b", "\u202e", "\ud800"):
        assert piece not in shown
    assert shown.count("[red]x[/red] [/nothing]") == 3 and shown.count("\\u001b[31mred") == 3


def test_every_command_uses_our_console() -> None:
    folder = Path(__file__).parents[3] / "compress" / "cli"
    users = {p.name for p in folder.glob("*.py") if "from rich.console import" in p.read_text(encoding="utf-8")}
    assert users <= {"targets.py"}, "its markup is of our own words"
