"""Packing documents into rows of token ids."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import calibration_data
from compress import tokens
from compress.chat import Rendered
from compress.errors import ConfigError
from compress.texts import EVALUATION

VOCAB = 4096
END_OF_TEXT = 0
TOKENIZER = tokens.load_tokenizer(calibration_data.reference_model())


def encode(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False, verbose=False).input_ids)


document_lists = st.lists(st.text(alphabet="ab é\n語", max_size=30), max_size=8)


@settings(deadline=None, max_examples=60)
@given(document_lists, st.integers(1, 4), st.integers(1, 12))
def test_pack_keeps_every_token_in_order(documents: list[str], num_samples: int, seq_len: int) -> None:
    expected: list[int] = []
    for document in filter(None, documents):
        expected += ([END_OF_TEXT] if expected else []) + encode(document)
    num_rows = min(num_samples, len(expected) // seq_len)
    sizes = {"num_samples": num_samples, "seq_len": seq_len, "vocab_size": VOCAB}
    if num_rows == 0:
        with pytest.raises(ConfigError, match=f"gives {len(expected)} tokens, one sample needs {seq_len}"):
            tokens.pack(documents, TOKENIZER, **sizes)
        return
    packed = tokens.pack(documents, TOKENIZER, **sizes)
    assert packed.ids_NT.shape == (num_rows, seq_len) and packed.ids_NT.dtype == torch.int64
    assert packed.ids_NT.flatten().tolist() == expected[: num_rows * seq_len]
    assert packed.num_total == packed.ids_NT.numel() + packed.num_unused <= len(expected)
    # rows are missing only when everything was read
    assert num_rows == num_samples or packed.num_total == len(expected)


def test_pack_stops_reading_when_full() -> None:
    def endless() -> Iterator[str]:
        yield "one two three four"
        raise AssertionError("read a document too many")

    packed = tokens.pack(endless(), TOKENIZER, num_samples=1, seq_len=2, vocab_size=VOCAB)
    assert packed.num_unused == len(encode("one two three four")) - 2


def test_a_tokenizer_that_adds_bos_marks_documents_by_it(shared_data: Path) -> None:
    tokenizer = tokens.load_tokenizer(shared_data / "stories260K")
    packed = tokens.pack(["Once", "upon"], tokenizer, num_samples=1, seq_len=4, vocab_size=512)
    ids = [*tokenizer("Once").input_ids, *tokenizer("upon").input_ids]
    assert ids.count(tokenizer.bos_token_id) == 2
    assert packed.ids_NT[0].tolist() == ids[:4]


def test_every_row_begins_as_the_tokenizer_begins_a_text(shared_data: Path) -> None:
    """Rows from within a document get BOS; none of the text is lost, and no row gets two."""
    tokenizer = tokens.load_tokenizer(shared_data / "stories260K")
    bos = tokenizer.bos_token_id
    document = "Once upon a time there was a ship that sailed for the east."
    ids = tokenizer(document).input_ids
    packed = tokens.pack([document], tokenizer, num_samples=100, seq_len=5, vocab_size=512)
    assert packed.ids_NT[:, 0].eq(bos).all() and not packed.ids_NT[:, 1:].eq(bos).any()
    used = packed.ids_NT[:, 1:].flatten().tolist()
    assert [bos, *used] == ids[: len(used) + 1] and packed.num_total == len(ids)
    assert packed.num_unused == len(ids) - 1 - len(used) < 4
    assert tokens.begin_id(tokenizer) == bos and tokens.begin_id(TOKENIZER) is None


def test_a_chat_is_taken_as_its_template_wrote_it(shared_data: Path) -> None:
    """No second BOS before it and no separator behind it."""
    tokenizer = tokens.load_tokenizer(shared_data / "stories260K")
    written = [Rendered("<s>Once</s>"), Rendered("<s>upon</s>")]
    ids = tokenizer("".join(written), add_special_tokens=False).input_ids
    assert ids.count(tokenizer.bos_token_id) == 2
    assert [i for piece in tokens.joined_ids(written, tokenizer) for i in piece] == [
        i for w in written for i in tokenizer(w, add_special_tokens=False).input_ids
    ]
    plain = [i for piece in tokens.joined_ids([Rendered("a<|endoftext|>"), "b"], TOKENIZER) for i in piece]
    assert plain == [*encode("a"), END_OF_TEXT, END_OF_TEXT, *encode("b")]


def test_errors_name_what_the_text_is_for() -> None:
    with pytest.raises(ConfigError, match="^evaluation text gives"):
        tokens.pack(["a"], TOKENIZER, num_samples=1, seq_len=9, vocab_size=VOCAB, purpose=EVALUATION)


@pytest.mark.parametrize(("num_samples", "seq_len"), [(0, 8), (4, 0)], ids=["samples", "length"])
def test_pack_refuses_nothing_to_fill(num_samples: int, seq_len: int) -> None:
    with pytest.raises(ConfigError, match="at least 1 sample of 1 token"):
        tokens.pack(["text"], TOKENIZER, num_samples=num_samples, seq_len=seq_len, vocab_size=VOCAB)


def test_too_short_a_text_names_a_length_that_works() -> None:
    text = "one two three four five six"
    num_tokens = len(encode(text))
    with pytest.raises(ConfigError, match=r"one sample needs 512; pass more text or --seq-len (\d+)$") as caught:
        tokens.pack([text], TOKENIZER, num_samples=1, seq_len=512, vocab_size=VOCAB)
    assert f"gives {num_tokens} tokens" in str(caught.value)
    suggested = int(str(caught.value).rsplit(" ", 1)[1])
    assert num_tokens / 2 < suggested <= num_tokens


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    largest = max(encode("one two"))
    with pytest.raises(ConfigError, match=f"gives id {largest}, the model's vocabulary has {largest} entries"):
        tokens.pack(["one two"], TOKENIZER, num_samples=1, seq_len=2, vocab_size=largest)
    tokens.pack(["one two"], TOKENIZER, num_samples=1, seq_len=2, vocab_size=largest + 1)


def test_hashes_follow_content() -> None:
    ids_NT = torch.arange(6).view(2, 3)
    assert tokens.ids_sha256(ids_NT) == tokens.ids_sha256(ids_NT.T.contiguous().T)
    assert len({tokens.ids_sha256(i) for i in (ids_NT, ids_NT.view(3, 2), ids_NT + 1)}) == 3


def test_tokenizer_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        tokens.load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        tokens.load_tokenizer(tmp_path)
    shutil.copytree(calibration_data.reference_model(), tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "m" / "tokenizer.json").write_text('{"broken"', encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be loaded .*put the model's tokenizer.json"):
        tokens.load_tokenizer(tmp_path / "m")


def test_a_setting_of_another_type_is_named_when_the_tokenizer_is_loaded(reference_model: Path, tmp_path: Path) -> None:
    """transformers believes `model_max_length` until a text is compared with it."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(reference_model / name, tmp_path / name)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": "many"}))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        tokens.load_tokenizer(tmp_path)
