"""What of a row of a data set is the text to read: a column of strings, or a chat."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from compress.errors import ConfigError

CHAT_COLUMNS = ("messages", "conversations", "conversation")

Render = Callable[[Any, str], str]
"""Writes out a list of chat messages; the second argument says where they stand, for errors."""


def json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, and integers of thousands of digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(
            f'{where} is not a JSON object on one line ({reason}); write one {{"text": ...}} a line'
        ) from error
    if not isinstance(row, dict):
        raise ConfigError(
            f'{where} holds a JSON {type(row).__name__} and not an object; write one {{"text": ...}} a line'
        )
    return row


def text_column(row: dict[str, Any], where: str, purpose: str) -> str:
    """What of a row is the text: `text`, a list of chat messages, or else the only column that can be meant.

    The only one is a column of strings without another of strings or lists beside it, whose name does not say that it
    tells rows apart. Everything else is refused, since a guess would calibrate or judge on something unasked for.
    """
    if "text" in row:
        return "text"
    chats = [name for name in CHAT_COLUMNS if isinstance(row.get(name), list)]
    if len(chats) == 1:
        return chats[0]
    strings = [name for name in row if isinstance(row[name], str)]
    nested = [name for name in row if isinstance(row[name], list | dict)]
    if len(strings) == 1 and not nested and not _names_rows(strings[0]) and strings[0] not in CHAT_COLUMNS:
        return strings[0]
    raise ConfigError(
        f"{where} has no column `text` of strings or `messages` of chat messages, and which of its columns "
        f"{', '.join(map(str, row)) or '(none)'} is meant cannot be told; rename the one for {purpose} to `text`"
    )


def _names_rows(column: str) -> bool:
    """Whether a column's name says that it holds names of rows and no text: id, doc_id, rowId, uuid, url, sha256."""
    lowered = column.lower()
    return lowered.endswith(("_id", "-id", "uuid", "url", "uri", "hash", "sha256")) or lowered in (
        "id", "idx", "index", "key", "name", "file", "path", "source", "split", "date", "timestamp", "label", "lang",
        "language", "meta",
    ) or column.endswith("Id")  # fmt: skip


def text_of(row: dict[str, Any], column: str, where: str, render: Render | None) -> str:
    value = row.get(column)
    if isinstance(value, list) and column != "text":
        if render is None:
            raise ConfigError(f'{where} is a chat in `{column}`, which is not read here; pass rows of {{"text": ...}}')
        value = render(value, where)
    if not isinstance(value, str):
        found = "is missing" if column not in row else f"is of type {type(value).__name__} and not a string"
        raise ConfigError(f"{where} cannot be used: column `{column}` {found}; mend or remove that row")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ConfigError(f"{where} has half a surrogate pair in `{column}`; mend or remove that row")
    return value
