"""The tokens of a long text as its tokenizer gives them for the whole of it, with a part of it in memory at a time.

A text must not be cut wherever it is convenient: tokenizers join line feeds, put a space before a text, take digits
by threes, so the parts' tokens are not the whole's. Here the text is tokenized in windows that overlap, and two
windows are joined at a token in the middle of the overlap where both give the same tokens at the same places, and begin
words at the same ones. What splits a text into words reads from left to right, so from a shared beginning of a word on
both read the same, and words are tokenized each by itself. Byte pair encodings may be joined within a word as well: one
is right if every two neighbouring tokens are, and every pair of the joined sequence stands in one of the windows. Where
the windows do not agree (a run of one character, whose tokens depend on where it began; digits by threes, whose words
do so where their tokens show nothing of it) they grow until they do, if need be to the whole text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 1 << 16
"""Characters tokenized at once; shorter texts are tokenized whole."""
OVERLAP = 1 << 11

Token = tuple[int, int, int, bool]
"""Id, first character, character behind the last, and whether it begins a word."""


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    """All of `text` at once, with the special tokens that the tokenizer puts around a text if `special`."""
    # verbose=False: no warning that a document is longer than the context, it will be cut into rows
    return list(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> Iterator[list[int]]:
    """As `token_ids`, piece by piece: the pieces joined are its list. Who stops early has paid for what was taken.

    A tokenizer that does not say where its tokens lie (one written in Python) gets the text whole.
    """
    around = _around(tokenizer) if special else ([], [])
    if len(text) <= WINDOW or not tokenizer.is_fast or around is None:
        yield token_ids(tokenizer, text, special=special)
        return
    yield around[0]
    yield from _joined(tokenizer, text)
    yield around[1]


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]] | None:
    """The special tokens before and behind a text; None where they cannot be told apart from the text's own."""
    bare, dressed = (token_ids(tokenizer, "a", special=special) for special in (False, True))
    places = [i for i in range(len(dressed) - len(bare) + 1) if dressed[i : i + len(bare)] == bare]
    return (dressed[: places[0]], dressed[places[0] + len(bare) :]) if bare and len(places) == 1 else None


@dataclass(frozen=True)
class _Window:
    """Tokens of the characters `start` to `stop`, with their places in the text. within: may be joined inside words."""

    start: int
    stop: int
    tokens: list[Token]
    within: bool


def _joined(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[list[int]]:
    least = max(OVERLAP, 4 * _longest_token(tokenizer))  # so that a window's end spoils no token behind the margin
    window = _read(tokenizer, text, 0, WINDOW)
    first = 0  # of the window's tokens, the first that has not been given out
    while window.stop < len(text):
        overlap = least
        seam = None
        while seam is None and overlap <= (window.stop - window.start) // 2:
            following = _read(tokenizer, text, window.stop - overlap, window.stop + WINDOW)
            seam = _seam(window, following)
            overlap *= 2
        if seam is None:  # the windows never agree: what has not been given out is read anew, twice as far
            window = _read(tokenizer, text, window.start, window.stop + (window.stop - window.start))
            continue
        yield [token for token, *_ in window.tokens[first : seam[0]]]
        window, first = following, seam[1]
    yield [token for token, *_ in window.tokens[first:]]


@lru_cache(maxsize=16)
def _longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """In characters (bytes, for tokenizers of bytes), the added tokens included."""
    return max(map(len, tokenizer.get_vocab()))


def _read(tokenizer: PreTrainedTokenizerBase, text: str, start: int, stop: int) -> _Window:
    read = tokenizer(text[start:stop], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    words = read.word_ids()
    begins = [i == 0 or word is None or word != words[i - 1] for i, word in enumerate(words)]
    places = zip(read.input_ids, read.offset_mapping, begins, strict=True)
    return _Window(
        start,
        min(stop, len(text)),
        [(i, start + a, start + b, begin) for i, (a, b), begin in places],
        within=type(tokenizer.backend_tokenizer.model).__name__ == "BPE",
    )


def _seam(left: _Window, right: _Window) -> tuple[int, int] | None:
    """Indices into both windows' tokens from where the right one goes on for the left one; None where they disagree.

    What lies within a quarter of the overlap of its ends may differ, since there a window does not see what comes
    before or behind. All between must be equal.
    """
    margin = (left.stop - right.start) // 4
    low, high = right.start + margin, left.stop - margin
    mine, theirs = ([i for i, (_, a, b, _) in enumerate(w.tokens) if low <= a and b <= high] for w in (left, right))
    if len(mine) < 2 or len(mine) != len(theirs):
        return None
    if left.tokens[mine[0] : mine[-1] + 1] != right.tokens[theirs[0] : theirs[-1] + 1]:
        return None
    places = [n for n in range(1, len(mine)) if left.within or left.tokens[mine[n]][3]]
    middle = min(places, key=lambda n: abs(2 * n - len(mine)), default=None)
    return None if middle is None else (mine[middle], theirs[middle])
