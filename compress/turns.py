"""What stands around the turns of a conversation, as the model's chat template writes it, in token ids.

A model trained to chat is used inside its template: special tokens and turns that no encyclopedia holds. To sample a
conversation from it, one gives it what the template writes before the user's words and lets it go on: it writes a
question, and, once the template's bridge stands behind that, an answer (Xu et al., "Magpie", arXiv:2406.08464).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.chat import render
from compress.errors import ConfigError
from compress.long_text import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USER, _ASSISTANT = "Hyacinth", "Marigold"  # words that a template passes on as they are, and holds none of


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Token ids. opening: before the user's words. end: the one that ends a turn. bridge: from there to the
    assistant's words. closing: from the end of those to the end of the conversation."""

    opening: tuple[int, ...]
    end: int
    bridge: tuple[int, ...]
    closing: tuple[int, ...]


def turns_of(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    """What the tokenizer's chat template puts around a user's and an assistant's words; None where it has no template,
    or one whose turns do not both end with the same special token."""
    messages = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}]
    try:
        text = str(render(tokenizer, messages, "the template's own example"))
    except ConfigError:
        return None
    if text.count(_USER) != 1 or text.count(_ASSISTANT) != 1 or text.index(_USER) > text.index(_ASSISTANT):
        return None
    before, rest = text.split(_USER)
    between, after = rest.split(_ASSISTANT)
    opening, bridge, closing = (token_ids(tokenizer, part, special=False) for part in (before, between, after))
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    if not opening or not bridge or not closing or bridge[0] != closing[0] or bridge[0] not in special:
        return None
    return Turns(opening=tuple(opening), end=bridge[0], bridge=tuple(bridge[1:]), closing=tuple(closing[1:]))
