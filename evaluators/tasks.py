"""Task accuracy by log-likelihood, from local JSONL files: which answer does the model find likeliest?

Two kinds of file, told by their first row:

    {"text": ...}                       last_word: is the last word the model's greedy continuation of the rest
    (LAMBADA)? {"query", "choices", "gold"}        multiple_choice: has the right choice the greatest log-likelihood
    (ARC, PIQA)?

Texts are cut into context and continuation, and these into tokens, as EleutherAI's lm-evaluation-harness does it, so
that results compare: the whole and the context are encoded, the continuation is what is left; spaces that end the
context go to the continuation. Multiple choice asks `query + "\\nAnswer:"` and continues with a space and the choice
(its `arc_easy`). `acc_norm` divides each choice's log-likelihood by its number of characters before comparing.

This file knows nothing of the runtime: it builds sequences, and scores what a `Reading` says of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compress.errors import ConfigError
from compress.files import file_sha256
from compress.runtime.runner import Reading, Span, Tokens
from evaluators.scoring import score_all

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question: the context and its possible continuations, `gold` the right one's index (last_word: one only)."""

    context: str
    continuations: tuple[str, ...]
    gold: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """chance: accuracy of guessing, mean of 1 / choices; None for last_word. num_available: rows in the file."""

    name: str
    kind: Literal["last_word", "multiple_choice"]
    items: list[Item]
    chance: float | None
    num_available: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """One continuation: its tokens `target`, and the sequence that predicts them from position `tokens.first` on."""

    item: int
    tokens: Tokens
    target: torch.Tensor
    num_characters: int


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Per item: right by likelihood (or greedy), right by likelihood a character, log-likelihood of the gold (nats)."""

    correct_N: npt.NDArray[np.bool_]
    correct_norm_N: npt.NDArray[np.bool_] | None
    gold_N: npt.NDArray[np.float64]


def load_task(spec: str, limit: int | None = None) -> Task:
    """A task from `FILE.jsonl` or `NAME=FILE.jsonl`, its first `limit` rows. ConfigError names file, line and field."""
    name, _, file = spec.rpartition("=")
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"task file {path} does not exist; pass --tasks FILE.jsonl or NAME=FILE.jsonl")
    rows, num_available = _rows(path, limit)
    if not rows:
        raise ConfigError(f"{path} holds no rows; a task needs at least one")
    first = rows[0][1]
    if not isinstance(first, dict) or not ({"text"} <= set(first) or {"query", "choices", "gold"} <= set(first)):
        keys = ", ".join(first) if isinstance(first, dict) else type(first).__name__
        raise ConfigError(f'{path} has rows of {keys}; a task needs rows of "text", or of "query", "choices", "gold"')
    kind: Literal["last_word", "multiple_choice"] = "multiple_choice" if "choices" in first else "last_word"
    read = _choice if kind == "multiple_choice" else _last_word
    items = [read(row, f"{path}, line {number}") for number, row in rows]
    chance = float(np.mean([1 / len(i.continuations) for i in items])) if kind == "multiple_choice" else None
    return Task(
        name=name or path.stem,
        kind=kind,
        items=items,
        chance=chance,
        num_available=num_available,
        sha256=file_sha256(path),
    )


def _rows(path: Path, limit: int | None) -> tuple[list[tuple[int, Any]], int]:
    """The first `limit` rows with their line numbers, and how many there are. Only a line feed ends a line."""
    rows: list[tuple[int, Any]] = []
    available = 0
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                if not raw.strip():
                    continue
                available += 1
                if limit is None or len(rows) < limit:
                    rows.append((number, json.loads(raw.decode("utf-8"))))
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError and JSONDecodeError are among them
        reason = "nested too deeply" if isinstance(e, RecursionError) else str(e)
        raise ConfigError(f"{path}, line {number}: not a JSON object on one line ({reason}); mend the row") from e
    except OSError as e:
        raise ConfigError(f"task file {path} cannot be read ({e.strerror}); pass --tasks FILE.jsonl") from e
    return rows, available


def _last_word(row: Any, where: str) -> Item:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str) or " " not in text.strip():
        raise ConfigError(f'{where}: "text" must be a string of at least two words; mend or remove the row')
    context, word = text.rsplit(" ", 1)
    if not word:
        raise ConfigError(f'{where}: "text" ends in a space, so it has no last word; mend or remove the row')
    return Item(context=context, continuations=(" " + word,), gold=0)


def _choice(row: Any, where: str) -> Item:
    query, choices, gold = (row.get(k) if isinstance(row, dict) else None for k in ("query", "choices", "gold"))
    if not isinstance(query, str):
        raise ConfigError(f'{where}: "query" must be a string, not {type(query).__name__}; mend or remove the row')
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise ConfigError(f'{where}: "choices" must be a list of two strings or more; mend or remove the row')
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise ConfigError(f'{where}: "gold" is {gold!r}, not an index into {len(choices)} choices; mend the row')
    return Item(context=query.rstrip() + "\nAnswer:", continuations=tuple(" " + c for c in choices), gold=gold)


def requests(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    front: int | None,
    max_length: int,
    positions: tuple[str, int] | None = None,
) -> list[Continuation]:
    """Every continuation of every item, in order. `front`: a token before each context.

    What is longer than `max_length` tokens loses its head, as in the harness. ConfigError for an item that has more
    tokens than the model has `positions` (their name in config.json, and how many).
    """
    out = []
    for number, item in enumerate(task.items):
        for continuation in item.continuations:
            context_ids, target_ids = encode_pair(tokenizer, item.context, continuation)
            before = ([] if front is None else [front]) + context_ids
            if not before:
                raise ConfigError(f"{task.name}: item {number} has an empty context; mend or remove the row")
            whole = (before + target_ids)[-(max_length + 1) :]
            if positions is not None and len(whole) - 1 > positions[1]:
                raise ConfigError(
                    f"{task.name}: item {number} has {len(whole) - 1} tokens, more than the model has positions "
                    f"({positions[0]} {positions[1]} in its config.json); shorten or remove the row"
                )
            out.append(
                Continuation(
                    item=number,
                    tokens=Tokens(ids_T=torch.tensor(whole[:-1]), first=len(whole) - 1 - len(target_ids)),
                    target=torch.tensor(target_ids),
                    num_characters=len(continuation) - 1,
                )
            )
    return out


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of the context and of the continuation; see the module docstring."""
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    context_ids, whole = (
        list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) for text in (bare, bare + continuation)
    )
    return context_ids, whole[len(context_ids) :]


def score(task: Task, asked: Sequence[Continuation], reading: Reading, offset: int) -> Answers:
    """What a model that has read the continuations' sequences, the first as its `offset`th, answers."""
    wanted = [(Span(offset + i, c.tokens.first, c.tokens.first + len(c.target)), c.target) for i, c in enumerate(asked)]
    return answers(task, asked, score_all(reading, wanted))


def answers(task: Task, asked: Sequence[Continuation], scored: Sequence[tuple[Tensor, Tensor]]) -> Answers:
    """What a model answers, from each continuation's scores: nll of its tokens (nats), and which are the likeliest."""
    n = len(task.items)
    likelihood: list[list[float]] = [[] for _ in range(n)]
    per_character: list[list[float]] = [[] for _ in range(n)]
    greedy = np.zeros(n, dtype=bool)
    for continuation, (nll_P, is_top_P) in zip(asked, scored, strict=True):
        total = -float(nll_P.sum())
        likelihood[continuation.item].append(total)
        per_character[continuation.item].append(total / max(1, continuation.num_characters))
        greedy[continuation.item] = bool(is_top_P.all())
    gold_N = np.array([row[item.gold] for row, item in zip(likelihood, task.items, strict=True)])
    if task.kind == "last_word":
        return Answers(correct_N=greedy, correct_norm_N=None, gold_N=gold_N)
    correct, norm = (
        np.array([int(np.argmax(row)) == item.gold for row, item in zip(rows, task.items, strict=True)])
        for rows in (likelihood, per_character)
    )
    return Answers(correct_N=correct, correct_norm_N=norm, gold_N=gold_N)
