"""Chats written out by the tokenizer's own template."""

from typing import Any

import pytest

import calibration_data
from compress import tokens
from compress.chat import Rendered, render
from compress.errors import ConfigError

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('late system') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{% endfor %}"
)


@pytest.fixture
def tokenizer() -> Any:
    made = tokens.load_tokenizer(calibration_data.reference_model())
    made.chat_template = TEMPLATE
    return made


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}], "<|user|>Hi.<|assistant|>Ho."),
        ([{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Ho."}], "<|user|>Hi.<|assistant|>Ho."),
        ([{"role": "user", "content": "Hi.", "name": None, "tool_calls": None}], "<|user|>Hi."),
        ([{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i."}]}], "<|user|>Hi."),
    ],
    ids=["messages", "ShareGPT", "nulls of Parquet", "parts of text"],
)
def test_shapes_of_chats(tokenizer: Any, messages: list[Any], expected: str) -> None:
    made = render(tokenizer, messages, "row 1")
    assert made == expected and isinstance(made, Rendered)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "holds an empty list"),
        ("Hi.", "holds a str where a list of messages"),
        (["Hi."], "message 1, is a str"),
        ([{"content": "Hi."}], "message 1, has no role among its content"),
        ([{"role": "user"}], "message 1, has no content"),
        ([{"from": "oracle", "value": "Hi."}], "is from 'oracle', which is none of human, user"),
        ([{"role": "user", "content": [{"type": "image"}]}], "something else than text"),
        ([{"role": "user", "content": 5}], "something else than text"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "template \\(late system\\)"),
    ],
)
def test_other_shapes_are_refused(tokenizer: Any, messages: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^row 1.*{message}"):
        render(tokenizer, messages, "row 1")


def test_the_day_does_not_matter(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}: {{ messages[0].content }}"
    assert render(tokenizer, [{"role": "user", "content": "Hi."}], "row 1") == "26 Jul 2024: Hi."


def test_no_template_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="row 1 is a chat, and this model's tokenizer has no chat template"):
        render(tokenizer, [{"role": "user", "content": "Hi."}], "row 1")
