"""Texts become rows: nothing lost or reordered, shares kept, boundaries where they are; too little text refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import calibration_data
from compress.distill import data
from compress.distill.data import Mix
from compress.distill.rows import RowsWriter, order, read_rows, shares
from compress.errors import ArtifactError, ConfigError
from compress.losses.in_blocks import IGNORED
from compress.tokens import load_tokenizer

TOKENIZER = load_tokenizer(calibration_data.reference_model())


def encode(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False, verbose=False).input_ids)


@settings(max_examples=50, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(1, 50), max_size=12), max_size=8),
    seq_len=st.integers(1, 7),
    most=st.one_of(st.none(), st.integers(1, 5)),
)
def test_rows_are_the_stream_cut(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], seq_len: int, most: int | None
) -> None:
    writer = RowsWriter(tmp_path_factory.mktemp("rows"), seq_len)
    for ids in documents:
        writer.begin()
        writer.take(ids[:3], most=most)
        writer.take(ids[3:], most=most)
    stream = [i for ids in documents for i in ids]
    num = len(stream) // seq_len if most is None else min(most, len(stream) // seq_len)
    if num == 0:
        return
    assert writer.end_source() == len(stream) - num * seq_len
    rows = writer.finish([])
    assert rows.ids_NT.tolist() == np.reshape(stream[: num * seq_len], (num, seq_len)).tolist()
    begins = np.cumsum([0, *map(len, documents)])[:-1]
    assert rows.starts.tolist() == [b for b in begins.tolist() if b < num * seq_len]
    for row in range(num):  # the slow, obvious way
        for t in range(seq_len):
            place = row * seq_len + t
            before = [b for b in begins if row * seq_len <= b <= place]
            assert rows.positions(row)[t] == place - max([row * seq_len, *before])


def write_documents(writer: RowsWriter, *documents: list[int], separator: list[int] | None = None) -> None:
    """separator: before the second document only."""
    for number, ids in enumerate(documents):
        if number == 1 and separator:
            writer.take(separator)
        writer.begin()
        writer.take(ids)


def test_every_row_begins_as_a_text_does(tmp_path: Path) -> None:
    """With a begin-of-text token: one of its own for a row from within a document, none added where one stands."""
    writer = RowsWriter(tmp_path, 5, front=1)
    write_documents(writer, [1, 2, 3], [1, 4, 5, 6, 7, 8, 9], [1, 10, 11, 12, 13])
    assert writer.end_source() == 2
    rows = writer.finish([])
    assert rows.ids_NT.tolist() == [[1, 2, 3, 1, 4], [1, 5, 6, 7, 8], [1, 9, 1, 10, 11]]
    assert rows.starts.tolist() == [0, 3, 12]


def test_labels_stop_at_documents_when_they_are_isolated(tmp_path: Path) -> None:
    writer = RowsWriter(tmp_path, 6)
    write_documents(writer, [1, 2, 3, 4], [5, 6, 7], [8, 8, 8, 8], separator=[9])
    rows = writer.finish([])
    joined = rows.batch([1, 0], isolate=False)
    assert joined.positions_BT is None
    assert joined.ids_BT.tolist() == [[6, 7, 8, 8, 8, 8], [1, 2, 3, 4, 9, 5]]
    assert joined.labels_BT.tolist() == [[7, 8, 8, 8, 8, IGNORED], [2, 3, 4, 9, 5, IGNORED]]
    apart = rows.batch([1, 0], isolate=True)
    assert apart.positions_BT is not None
    assert apart.positions_BT.tolist() == [[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0]]
    assert apart.labels_BT.tolist() == [[7, IGNORED, 8, 8, 8, IGNORED], [2, 3, 4, 9, IGNORED, IGNORED]]


def test_isolated_documents_are_read_as_texts_of_their_own(tmp_path: Path, build_model: object) -> None:
    """The model's logits of a packed document are those of the document alone, and without isolation they are not."""
    from transformers import AutoModelForCausalLM

    for family in ("Llama", "Qwen3", "Gemma2"):
        model = AutoModelForCausalLM.from_pretrained(build_model(family, name=family)).eval()  # type: ignore[operator]
        writer = RowsWriter(tmp_path / f"rows-{family}", 10)
        write_documents(writer, [11, 12, 13, 14], [21, 22, 23, 24, 25, 26])
        rows = writer.finish([])
        apart, joined = rows.batch([0], isolate=True), rows.batch([0], isolate=False)
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([[21, 22, 23, 24, 25, 26]])).logits
            packed = model(input_ids=apart.ids_BT, position_ids=apart.positions_BT, use_cache=False).logits[:, 4:]
            leaking = model(input_ids=joined.ids_BT, use_cache=False).logits[:, 4:]
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(leaking, alone, rtol=1e-2, atol=1e-2), family


def write(path: Path, *texts: str) -> str:
    import json

    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return str(path)


WORDS = "the old house stood by the river and nobody had lived there for many years since the war "


def test_build_mixes_by_shares(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.jsonl", WORDS * 20, WORDS * 20), write(tmp_path / "b.jsonl", *["Why not? " * 9] * 30)
    mix = Mix.of([one, two], "3,1")
    rows = data.build(mix, TOKENIZER, tmp_path / "rows", num_rows=8, seq_len=16, vocab_size=4096)
    assert [s["num_rows"] for s in rows.sources] == [6, 2]
    assert rows.ids_NT[:6].flatten().tolist() == encode(WORDS * 20)[: 6 * 16]
    end = TOKENIZER.eos_token_id
    assert rows.ids_NT[6:].flatten().tolist() == (encode("Why not? " * 9) + [end] + encode("Why not? " * 9))[:32]
    again = data.build(mix, TOKENIZER, tmp_path / "again", num_rows=8, seq_len=16, vocab_size=4096)
    assert again.sha256 == rows.sha256 == read_rows(tmp_path / "rows", check=True).sha256
    other = data.build(Mix.of([one, two], "1,1"), TOKENIZER, tmp_path / "o", num_rows=8, seq_len=16, vocab_size=4096)
    assert other.sha256 != rows.sha256


def test_build_takes_all_of_one_text(tmp_path: Path) -> None:
    text = write(tmp_path / "a.jsonl", WORDS * 20, "", WORDS)
    rows = data.build(Mix.of([text], None), TOKENIZER, tmp_path / "rows", num_rows=None, seq_len=16, vocab_size=4096)
    total = len(encode(WORDS * 20)) + 1 + len(encode(WORDS))
    assert len(rows) == total // 16
    assert rows.sources[0]["num_tokens_total"] == total and rows.sources[0]["num_tokens_unused"] == total % 16
    assert rows.sources[0]["num_documents"] == 3


def test_what_the_teacher_wrote(tmp_path: Path) -> None:
    end = TOKENIZER.eos_token_id
    ids = torch.tensor([[end, 5, 6, end, 7, 8], [end, 9, 9, 9, 9, end]])
    rows = data.build(
        Mix.of(["self"], None),
        TOKENIZER,
        tmp_path / "rows",
        num_rows=2,
        seq_len=6,
        vocab_size=4096,
        sample=lambda n: ids,
    )
    assert rows.ids_NT.tolist() == ids.tolist()
    assert rows.starts.tolist() == [0, 4, 6]


@pytest.mark.parametrize(
    ("sources", "mix", "rows", "message"),
    [
        (["a"], None, 100, r"a\.jsonl gives 448 tokens in rows of 16, and 1600 of it are asked for; pass --tokens 448, "
                           r"more text, or --epochs 4 to read it more than once"),
        (["a", "b"], "1,1", 60, r"a\.jsonl gives 448 tokens in rows of 16, and 480 of it .*; pass fewer --tokens, or a "
                                r"smaller share"),
        (["c"], None, None, r"c\.jsonl gives 2 tokens, and one row needs 16; pass --seq-len 2, or more text"),
        (["a", "b"], None, None, "--tokens is needed with several sources"),
        (["self"], None, None, "--tokens is needed"),
        (["a"], "1,2", 3, "--mix 1,2 gives 2 shares for 1 sources"),
        (["a"], "x", 3, "--mix x is not a list of numbers"),
        (["a", "b"], "1,0", 3, "and all must be positive"),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, sources: list[str], mix: str | None, rows: int | None, message: str) -> None:
    texts = {"a": write(tmp_path / "a.jsonl", WORDS * 24), "b": write(tmp_path / "b.jsonl", WORDS * 90)}
    texts["c"] = write(tmp_path / "c.jsonl", "Why?")
    with pytest.raises(ConfigError, match=message):
        specs = [texts.get(s, s) for s in sources]
        data.build(Mix.of(specs, mix), TOKENIZER, tmp_path / "r", num_rows=rows, seq_len=16, vocab_size=4096)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    text = write(tmp_path / "a.jsonl", WORDS * 24)
    largest = max(encode(WORDS))
    with pytest.raises(ConfigError, match=f"gives id {largest}, the models' common vocabulary has {largest} entries"):
        data.build(Mix.of([text], None), TOKENIZER, tmp_path / "r", num_rows=None, seq_len=16, vocab_size=largest)


def test_damaged_rows_are_refused(tmp_path: Path) -> None:
    writer = RowsWriter(tmp_path, 4)
    write_documents(writer, list(range(8)))
    writer.finish([])
    whole = (tmp_path / "rows.bin").read_bytes()
    (tmp_path / "rows.bin").write_bytes(whole[:-4])
    with pytest.raises(ArtifactError, match="28 bytes, and 2 rows of 4 need others"):
        read_rows(tmp_path)
    (tmp_path / "rows.bin").write_bytes(bytes(4) + whole[4:-4] + bytes(4))
    with pytest.raises(ArtifactError, match=r"rows\.bin: its content is not what was written"):
        read_rows(tmp_path, check=True)


@given(total=st.integers(0, 200), weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_shares(total: int, weights: list[float]) -> None:
    found = shares(total, weights)
    assert sum(found) == total
    assert all(abs(n - total * w / sum(weights)) < 1 for n, w in zip(found, weights, strict=True))


def test_order_is_a_permutation_of_its_own() -> None:
    first, second = order(50, 0, 0), order(50, 0, 1)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first.tolist() != second.tolist() != list(range(50))
    assert order(50, 0, 0).tolist() == first.tolist() != order(50, 1, 0).tolist()
