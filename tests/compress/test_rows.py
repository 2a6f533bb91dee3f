"""What of a row is the text."""

from typing import Any

import pytest

from compress.errors import ConfigError
from compress.rows import text_column, text_of

CHAT = [{"role": "user", "content": "Hello."}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"id": "7", "text": "a", "title": "b"}, "text"),
        ({"text": "a", "messages": CHAT}, "text"),
        ({"text": None, "content": "a"}, "text"),
        ({"messages": CHAT, "id": "x"}, "messages"),
        ({"prompt_id": "x", "prompt": "a", "messages": CHAT}, "messages"),
        ({"conversations": CHAT, "system": "a"}, "conversations"),
        ({"id": 1, "content": "a"}, "content"),
    ],
)
def test_what_can_only_be_meant(row: dict[str, Any], expected: str) -> None:
    assert text_column(row, "rows", "calibration") == expected


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"a": "x", "b": "y"},
        {"prompt": "a", "response": "b"},
        {"id": "x"},
        {"doc_id": "x", "n": 1},
        {"rowId": "x"},
        {"url": "x"},
        {"id": "x", "tokens": [1, 2]},
        {"content": "x", "tokens": [1, 2]},
        {"prompt": CHAT, "completion": CHAT},
        {"messages": CHAT, "conversations": CHAT},
        {"messages": "[{...}]"},
        {"n": 1},
    ],
    ids=str,
)
def test_what_would_be_a_guess_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="^rows has no column `text` of strings or `messages`.*for evaluation to"):
        text_column(row, "rows", "evaluation")


def test_text_of_another_type_is_refused_by_name() -> None:
    for value, kind in ((5, "int"), (None, "NoneType"), (["a"], "list"), ({"a": "b"}, "dict")):
        with pytest.raises(ConfigError, match=f"column `text` is of type {kind} and not a string"):
            text_of({"text": value}, "text", "row 1", render=lambda messages, where: "never asked")
    with pytest.raises(ConfigError, match="row 1 is a chat in `messages`, which is not read here"):
        text_of({"messages": CHAT}, "messages", "row 1", None)
    assert text_of({"messages": CHAT}, "messages", "row 1", lambda messages, where: f"{where}: {len(messages)}") == (
        "row 1: 1"
    )
