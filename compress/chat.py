"""Chats as text: lists of messages written out by the chat template that came with the model's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ShareGPT's names of the speakers, and the ones that templates know.
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Some templates put the day's date into the text; equal rows must give equal tokens on any day.
_NO_CLOCK = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


class Rendered(str):
    """A text that a chat template wrote: its special tokens stand in it, and none are to be put around it."""


def render(tokenizer: PreTrainedTokenizerBase, messages: Any, where: str) -> Rendered:
    """`messages` (`[{"role": ..., "content": ...}, ...]`, or ShareGPT's `from` and `value`) as the model is shown them.

    ConfigError, beginning with `where`, when the tokenizer has no chat template, when the messages are of another
    shape, or when the template refuses them.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise ConfigError(
            f"{where} is a chat, and this model's tokenizer has no chat template to write it out with; pass rows "
            'of {"text": ...}'
        )
    if "strftime_now" in template:
        template = _NO_CLOCK + template
    chat = _messages(messages, where)
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, chat_template=template)
    except Exception as error:  # templates are programs: they raise whatever they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{where} cannot be written out by the tokenizer's chat template ({reason[:160]}); mend or remove that row"
        ) from error
    return Rendered(text)


def _messages(messages: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        what = "an empty list" if messages == [] else f"a {type(messages).__name__}"
        raise ConfigError(f"{where} holds {what} where a list of messages is needed; mend or remove that row")
    return [_message(message, f"{where} message {number},") for number, message in enumerate(messages, start=1)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ConfigError(
            f"{where} is a {type(message).__name__} and not an object with a role; mend or remove that row"
        )
    known = {key: value for key, value in message.items() if value is not None}  # Parquet fills up with nulls
    if "role" not in known and {"from", "value"} <= set(known):
        speaker = known.pop("from")
        if speaker not in _ROLES:
            raise ConfigError(f"{where} is from {speaker!r}, which is none of {', '.join(_ROLES)}; mend that row")
        known = {**known, "role": _ROLES[speaker], "content": known.pop("value")}
    if not isinstance(known.get("role"), str):
        keys = ", ".join(map(str, known)) or "nothing"
        raise ConfigError(f"{where} has no role among its {keys}; mend or remove that row")
    if "content" in known:
        known["content"] = _content(known["content"], where)
    elif "tool_calls" not in known:
        raise ConfigError(f"{where} has no content; mend or remove that row")
    return known


def _content(content: Any, where: str) -> str:
    """A message's text: a string, or the texts of parts that are nothing but text."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [p.get("text") if isinstance(p, Mapping) and p.get("type") == "text" else None for p in parts]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{where} holds something else than text in its content; mend or remove that row")
    return "".join(t for t in texts if t is not None)
