"""Task files, their tokens, and answers against one slow forward a request."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress import tokens
from compress.errors import ConfigError
from compress.runtime.streamed import TorchRunner
from evaluators.tasks import encode_pair, load_task, requests, score


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
    return path


CHOICES = [
    {"query": "Question: What is water?\n", "choices": ["a liquid", "a stone", "the king of France"], "gold": 0},
    {"query": "Question: Who wrote it", "choices": ["nobody", "é"], "gold": 1},
]
TEXTS = [{"text": "The old man went down to the river"}, {"text": "She said that he was a friend of the king"}]


def test_kinds_and_chance(tmp_path: Path) -> None:
    words = load_task(str(write(tmp_path / "words.jsonl", TEXTS)))
    assert (words.name, words.kind, words.chance) == ("words", "last_word", None)
    assert words.items[0].context == "The old man went down to the" and words.items[0].continuations == (" river",)
    choice = load_task(f"mine={write(tmp_path / 'c.jsonl', CHOICES)}", limit=1)
    assert (choice.name, choice.kind, choice.num_available, len(choice.items)) == ("mine", "multiple_choice", 2, 1)
    assert choice.chance == pytest.approx(1 / 3)
    assert choice.items[0].context == "Question: What is water?\nAnswer:"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([TEXTS[0], {"text": 5}], 'line 2: "text" must be a string'),
        ([TEXTS[0], {"text": "ends in a space "}], "has no last word"),
        ([CHOICES[0], {**CHOICES[1], "gold": 2}], '"gold" is 2, not an index into 2 choices'),
        ([CHOICES[0], {**CHOICES[1], "choices": ["one"]}], "line 2"),
        ([TEXTS[0], "{not json"], "line 2: not a JSON object"),
        ([{"question": "?"}], "has rows of question"),
        ([], "holds no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        load_task(str(write(tmp_path / "bad.jsonl", rows)))


def test_pair_joins_to_the_whole(reference_model: Path) -> None:
    tokenizer = tokens.load_tokenizer(reference_model)
    for context, continuation in (("He was  ", " here"), ("He was", " é"), ("A", " b"), ("x\n", "y")):
        before, after = encode_pair(tokenizer, context, continuation)
        assert before + after == tokenizer(context + continuation, add_special_tokens=False).input_ids
        assert before == tokenizer(context.rstrip(), add_special_tokens=False).input_ids


@pytest.mark.parametrize(("rows", "front"), [(TEXTS, None), (CHOICES, 0)])
def test_answers_equal_one_forward_a_request(
    reference_model: Path, tmp_path: Path, rows: list[Any], front: Any
) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = tokens.load_tokenizer(reference_model)
    model = AutoModelForCausalLM.from_pretrained(reference_model, dtype=torch.float32).eval()
    task = load_task(str(write(tmp_path / "task.jsonl", rows)))
    asked = requests(task, tokenizer, front=front, max_length=512)
    reading = TorchRunner.open(reference_model).read([r.tokens for r in asked])
    answers = score(task, asked, reading, 0)
    for i, item in enumerate(task.items):
        totals, norms, greedy = [], [], False
        for continuation in item.continuations:
            before, after = encode_pair(tokenizer, item.context, continuation)
            ids = ([] if front is None else [front]) + before + after
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -len(after) - 1 : -1].double()
            picked = logits.log_softmax(-1)[range(len(after)), after]
            totals.append(float(picked.sum()))
            norms.append(totals[-1] / (len(continuation) - 1))
            greedy = logits.argmax(-1).tolist() == after
        assert answers.gold_N[i] == pytest.approx(totals[item.gold], rel=1e-4)
        if task.kind == "last_word":
            assert answers.correct_N[i] == greedy and answers.correct_norm_N is None
        else:
            assert answers.correct_N[i] == (int(np.argmax(totals)) == item.gold)
            assert answers.correct_norm_N is not None
            assert answers.correct_norm_N[i] == (int(np.argmax(norms)) == item.gold)


def test_long_contexts_lose_their_start(reference_model: Path, tmp_path: Path) -> None:
    tokenizer = tokens.load_tokenizer(reference_model)
    task = load_task(str(write(tmp_path / "t.jsonl", [{"text": "word " * 600 + "river"}])))
    (request,) = requests(task, tokenizer, front=None, max_length=64)
    assert len(request.tokens.ids_T) == 64 and request.tokens.first + len(request.target) == 64


def test_only_a_line_feed_ends_a_row(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [{"text": f"the old{end}man"} for end in (" \x85", " \u2028", " \u2029")]
    path.write_bytes(b"\r\n".join(json.dumps(row, ensure_ascii=False).encode() for row in rows))
    assert [i.continuations for i in load_task(str(path)).items] == [(f" {end}man",) for end in "\x85\u2028\u2029"]
    assert load_task(str(path), limit=1).num_available == 3
    for content, message in ((b'{"text": "\xff"}', "line 1: not a JSON object"), (b"[" * 100_000, "nested too deeply")):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            load_task(str(path))


def test_items_longer_than_the_model_are_refused(reference_model: Path, tmp_path: Path) -> None:
    task = load_task(str(write(tmp_path / "t.jsonl", [TEXTS[0], {"text": "the old man " * 40 + "went"}])))
    tokenizer = tokens.load_tokenizer(reference_model)
    limit = ("max_position_embeddings", 64)
    with pytest.raises(ConfigError, match=r"t: item 1 has \d+ tokens.*\(max_position_embeddings 64 in"):
        requests(task, tokenizer, front=None, max_length=512, positions=limit)
    assert len(requests(task, tokenizer, front=None, max_length=64, positions=limit)) == 2
