"""A long text tokenized in windows gives the tokens of the whole of it, whatever is done at a text's ends."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import calibration_data
from compress import long_text, tokens
from compress.long_text import ids_of, token_ids


def with_tokenizer(folder: Path, **changes: Any) -> Any:
    """The reference tokenizer with parts of its tokenizer.json replaced."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(calibration_data.reference_model() / name, folder / name)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = changes.pop("model", {})
    content = {**content, **changes, "model": {**content["model"], **model}}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return tokens.load_tokenizer(folder)


PIECES = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
UNIGRAM = {
    "type": "Unigram", "unk_id": 0, "byte_fallback": False,
    "vocab": [["<unk>", 0.0], *[[c, -6.0] for c in "▁abé語\n\t0123456789"], *[[w, -7.5] for w in ("▁a", "ab", "aab")],
              ["▁▁▁", -8.0], ["aaaa", -9.0], ["\n\n", -7.0], ["12", -8.0]],
}  # fmt: skip


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Real ones, and the reference tokenizer changed to do what others do at a text's beginning and inside it."""
    home = tmp_path_factory.mktemp("tokenizers")
    digits = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}| ?\p{L}+|\s+(?!\S)|\s+"}, "behavior": "Isolated",
         "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]}  # fmt: skip
    made = {
        "reference": tokens.load_tokenizer(calibration_data.reference_model()),
        "prepends a space": with_tokenizer(home / "prepend", normalizer={"type": "Prepend", "prepend": " "}),
        "digits by threes": with_tokenizer(home / "digits", pre_tokenizer=digits),
        "composes characters": with_tokenizer(home / "nfc", normalizer={"type": "NFC"}),
        "unigram of words": with_tokenizer(
            home / "words", model=UNIGRAM, pre_tokenizer={**PIECES, "split": True}, added_tokens=[]
        ),
        "unigram": with_tokenizer(home / "unigram", model=UNIGRAM, pre_tokenizer=PIECES, added_tokens=[]),
    }
    # others' tokenizers, where they are at hand: see shared/models and shared/data
    beside = Path(__file__).resolve().parents[3]
    data = Path(os.environ.get("COMPRESS_DATA", beside / "shared" / "data"))
    models = Path(os.environ.get("COMPRESS_MODELS", beside / "models"))
    for folder in (data / "stories260K", models / "smollm2-135m", models / "gemma3-270m"):
        if (folder / "tokenizer.json").exists():
            made[folder.name] = tokens.load_tokenizer(folder)
    return made


def joined(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    return [i for piece in ids_of(tokenizer, text, special=special) for i in piece]


pieces = st.one_of(
    st.text(alphabet="ab é\n\t語0123456789", max_size=40),
    st.tuples(st.sampled_from(["a", " ", "\n", "7", "ab", "é", " \n", "<|endoftext|>"]), st.integers(1, 90)).map(
        lambda pair: pair[0] * pair[1]
    ),
    st.sampled_from(["In the year 1871 the ship sailed.\n\n", "  \u0301e\u0308", "🦙🏽", "It's 1,234,567.89 metres"]),
)


@settings(deadline=None, max_examples=200)
@given(text=st.lists(pieces, min_size=1, max_size=20).map("".join), window=st.integers(60, 300), special=st.booleans())
@example(text="0000000In the year 1871 the ship sailed.\n\n0" + "7" * 76 + "00", window=60, special=False)
def test_windows_leave_no_trace(tokenizers: dict[str, Any], text: str, window: int, special: bool) -> None:
    held = long_text.WINDOW, long_text.OVERLAP
    long_text.WINDOW, long_text.OVERLAP = window, 8
    try:
        for name, tokenizer in tokenizers.items():
            whole = token_ids(tokenizer, text, special=special)
            assert joined(tokenizer, text, special) == whole, name
    finally:
        long_text.WINDOW, long_text.OVERLAP = held


def test_a_text_of_many_windows(tokenizers: dict[str, Any]) -> None:
    """At the real sizes: prose with everything in it that tokenizers treat apart, and runs longer than a window."""
    dice = random.Random(0)
    words = "the old house stood by the river 1871 and 20,000 years  since\n the\n\nwar été 語 \t".split(" ")
    prose = " ".join(dice.choice(words) for _ in range(30_000))
    run = "x" + "\n" * 70_001 + "7" * 70_000
    for name, tokenizer in tokenizers.items():
        for text in (prose, run):
            assert joined(tokenizer, text, True) == token_ids(tokenizer, text, special=True), name


def test_what_is_not_asked_for_is_not_tokenized(tokenizers: dict[str, Any]) -> None:
    """Ten million characters without a line feed: the first tokens cost one window, and not gigabytes."""
    tokenizer = tokenizers["reference"]
    read: list[int] = []

    class Counting:
        is_fast = True
        get_vocab = tokenizer.get_vocab
        backend_tokenizer = tokenizer.backend_tokenizer

        def __call__(self, text: str, **options: Any) -> Any:
            read.append(len(text))
            return tokenizer(text, **options)

    text = "the old house by the river " * 400_000
    first = next(piece for piece in ids_of(Counting(), text, special=False) if piece)  # type: ignore[arg-type]
    assert first == token_ids(tokenizer, text[: 1 << 16], special=False)[: len(first)]
    assert sum(read) <= 2 * long_text.WINDOW + long_text.OVERLAP


def test_a_tokenizer_without_offsets_gets_the_whole_text() -> None:
    class Slow:
        is_fast = False

        def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Any:
            return type("Encoding", (), {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]})

    text = "ab" * 40_000
    assert joined(Slow(), text, True) == [1, *map(ord, text)]
