"""What a chat template puts around turns, and conversations sampled between it."""

from typing import Any

import pytest
import torch

import calibration_data
from compress import sampling, tokens
from compress.turns import Turns, turns_of

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    """The reference model's, with two special tokens more: 4096 `<|im_start|>` and 4097 `<|im_end|>`."""
    found = tokens.load_tokenizer(calibration_data.reference_model())
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return found


def test_what_the_template_writes_around_the_words(tokenizer: Any) -> None:
    assert turns_of(tokenizer) is None  # no template
    tokenizer.chat_template = CHATML
    turns = turns_of(tokenizer)
    assert turns is not None
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (turns.opening[0], turns.end) == (start, end)
    said = [tokenizer.decode(ids) for ids in (turns.opening, turns.bridge, turns.closing)]
    assert said == ["<|im_start|>user\n", "\n<|im_start|>assistant\n", "\n"]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] }}\n{% endfor %}",  # nothing special ends a turn
        "{{ messages[0]['content'] }}<|im_end|>",  # the answer is left out
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}<|im_end|>{% endfor %}",
        "{% for m in messages %}<|im_start|>{{ m['content'] }}{{ '<|im_end|>' if loop.first else '' }}{% endfor %}",
    ],
)
def test_a_template_whose_turns_cannot_be_told_is_none(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    assert turns_of(tokenizer) is None


class Scripted:
    """A model that puts all probability on the next id of its row's script."""

    device = torch.device("cpu")

    def __init__(self, scripts: list[list[int]]) -> None:
        self._steps = iter(zip(*scripts, strict=True))

    def __call__(self, *, input_ids: torch.Tensor, past_key_values: Any, use_cache: bool) -> Any:
        logits = torch.full((len(input_ids), 1, 4200), -1e4)
        for row, token in enumerate(next(self._steps)):
            logits[row, 0, token] = 1e3
        return type("Output", (), {"logits": logits, "past_key_values": None})


def test_every_other_row_is_a_conversation(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(opening=(10, 11), end=20, bridge=(12,), closing=(13,))
    monkeypatch.setattr("compress.sampling.turns_of", lambda _: turns)
    drawn = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [99, 1, 20, 98, 2, 3, 20, 97, 96, 95]]
    options = {"num_samples": 2, "seq_len": 11, "seed": 0}
    plain, talk = sampling.sample_from_model(Scripted(drawn), tokenizer, chat=True, **options).tolist()  # type: ignore[arg-type]
    assert plain[1:] == drawn[0]
    #   opening   user   bridge  assistant   closing and the next opening
    assert talk == [10, 11, 1, 20, 12, 2, 3, 20, 13, 10, 11]
    both = sampling.sample_from_model(Scripted(drawn), tokenizer, **options).tolist()  # type: ignore[arg-type]
    assert [row[1:] for row in both] == drawn  # not asked for: two plain rows
    monkeypatch.setattr("compress.sampling.turns_of", lambda _: None)  # no template: the same
    assert sampling.sample_from_model(Scripted(drawn), tokenizer, chat=True, **options).tolist() == both  # type: ignore[arg-type]
