"""Reading calibration text, packing it into rows, and refusing what cannot be used."""

import gzip
import json
import lzma
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import calibration_data
from compress import calibration, sampling, texts, tokens
from compress.errors import ConfigError

VOCAB = 4096
END_OF_TEXT = 0
TOKENIZER = tokens.load_tokenizer(calibration_data.reference_model())


def encode(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False, verbose=False).input_ids)


def load(spec: str | None, *, num_samples: int = 4, seq_len: int = 8, **changes: Any) -> calibration.CalibrationSet:
    options: dict[str, Any] = {
        "seed": 0,
        "model": calibration_data.reference_model(),
        "is_reference": True,
        "vocab_size": VOCAB,
    }
    return calibration.load(spec, TOKENIZER, num_samples=num_samples, seq_len=seq_len, **(options | changes))


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), path)
    return path


# packing


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


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet="ab é\n語", min_size=1, max_size=80), st.integers(1, 3), st.integers(1, 12))
def test_pack_lines_is_each_line_and_a_line_feed(text: str, num_samples: int, seq_len: int) -> None:
    expected = [token for line in text.split("\n") for token in encode(line + "\n")]
    if len(expected) < seq_len:
        return
    packed = tokens.pack_lines(text, TOKENIZER, num_samples=num_samples, seq_len=seq_len, vocab_size=VOCAB)
    num_rows = min(num_samples, len(expected) // seq_len)
    assert packed.ids_NT.tolist() == [expected[i * seq_len : (i + 1) * seq_len] for i in range(num_rows)]


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


# reading


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\r\ntwo\n", ["one\ntwo\n"]),
        ("a.jsonl", '{"text": "one\\u2028two"}\n\n{"text": "", "other": "x"}\n', ["one\u2028two", ""]),
        ("a.json", '{"id": 1, "content": "one"}\n{"id": 2, "content": "two"}', ["one", "two"]),
    ],
    ids=["text is one document", "jsonl", "the only column of strings"],
)
def test_documents(tmp_path: Path, name: str, content: str, expected: list[str]) -> None:
    (tmp_path / name).write_bytes(content.encode("utf-8"))
    assert list(texts.documents(str(tmp_path / name))) == expected


@pytest.mark.parametrize(("suffix", "packer"), [(".gz", gzip), (".xz", lzma)])
def test_packed_documents(tmp_path: Path, suffix: str, packer: Any) -> None:
    """Read as the file inside them; one that is cut off or damaged is refused."""
    rows = tmp_path / f"a.jsonl{suffix}"
    rows.write_bytes(packer.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert list(texts.documents(str(rows))) == ["one", "two"]
    text = tmp_path / f"A.TXT{suffix.upper()}"
    text.write_bytes(packer.compress(b"one\r\ntwo\n"))
    assert list(texts.documents(str(text))) == ["one\ntwo\n"]
    whole = rows.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"plain", whole[:-8] + bytes(8)):
        rows.write_bytes(damaged)
        with pytest.raises(ConfigError, match="cannot be unpacked"):
            list(texts.documents(str(rows)))


def test_parquet_documents(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"id": [1, 2], "text": ["one", "two"], "title": ["x", "y"]})
    assert list(texts.documents(str(path))) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text in its 0 characters"),
        ("a.txt", b" \n\t\n", "holds no text in its 4 characters"),
        ("a.txt", b"abc\xff", "not UTF-8 text: byte 0xff at offset 3"),
        ("a.txt", b"ab\0c", "zero byte at character 2"),
        ("a.pdf", b"text", r"ends in \.pdf, and the kinds that can be read are \.txt"),
        ("a", b"text", "ends in nothing"),
        ("a.gz", b"text", "ends in nothing"),
        ("a.jsonl", b"\n", "has no rows"),
        ("a.jsonl", b"[1]\n", "line 1, holds a JSON list and not an object"),
        ("a.jsonl", b"{'text'}\n", "line 1, is not a JSON object on one line"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1, is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2, cannot be used: column `text` is missing"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', "column `text` is of type int and not a string"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "half a surrogate pair"),
        ("a.jsonl", b'{"a": "x", "b": "y"}\n', "no column `text` and 2 columns of strings .* a, b;"),
        ("a.jsonl", b'{"a": 1}\n', "0 columns of strings"),
        ("a.parquet", b"PAR0", "is not a Parquet file"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        list(texts.documents(str(tmp_path / name)))


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.txt does not exist; pass --calib FILE\.txt"):
        texts.documents(str(tmp_path / "nowhere.txt"))
    with pytest.raises(ConfigError, match="is a folder"):
        texts.documents(str(tmp_path))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a", None]}, "row 2, cannot be used: column `text` is of type NoneType"),
        ({"a": ["x"], "b": ["y"]}, "no column `text` and 2 columns of strings"),
    ],
    ids=["null", "columns"],
)
def test_unusable_parquet_is_refused(tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(ConfigError, match=message):
        list(texts.documents(str(path)))


def test_missing_libraries_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for module in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)  # None makes the import fail
    for spec in (str(tmp_path / "a.parquet"), "hf:some/set"):
        with pytest.raises(ConfigError, match=r"which is not installed; .*compress-toolkit\[datasets\]"):
            list(texts.documents(spec))


def test_hub_documents_from_a_local_data_set(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    rows = [{"text": "one", "title": "x"}, {"text": "two", "title": "y"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert list(texts.documents(f"hf:{tmp_path}")) == ["one", "two"]
    assert list(texts.documents(f"hf:{tmp_path}:train:title")) == ["x", "y"]
    with pytest.raises(ConfigError, match="column `body` is missing"):
        list(texts.documents(f"hf:{tmp_path}:train:body"))


@pytest.mark.parametrize("spec", ["hf:", "hf:a:b:c:d"], ids=["no name", "too many parts"])
def test_malformed_hub_name_is_refused(spec: str) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(ConfigError, match=r"is not hf:DATASET"):
        list(texts.documents(spec))


# all of it


def test_bundled_text_fills_the_default_size() -> None:
    made = load(None, num_samples=128, seq_len=512)
    assert made.ids_NT.shape == (128, 512)
    assert made.source == "bundled:self_sampled"
    assert made.num_tokens_total == made.ids_NT.numel() + made.num_tokens_unused
    everything = texts.documents(str(calibration_data.default_calibration()))
    spare = sum(len(encode(text)) + 1 for text in everything) - 1 - 128 * 512
    assert 0.02 < spare / (128 * 512) < 0.05


def test_text_file_is_cut_as_other_quantizers_are_measured(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("one two\n\nthree\nfour five six\n", encoding="utf-8")
    made = load(str(path), num_samples=2, seq_len=4)
    lines = [encode(line + "\n") for line in path.read_text(encoding="utf-8").split("\n")]
    assert made.ids_NT.flatten().tolist() == sum(lines, [])[:8]
    assert made.source == f"file:{path}"
    assert made.num_documents == 1
    assert made.text_sha256 == texts.text_sha256([path.read_text(encoding="utf-8")])


def test_fewer_rows_than_asked_for_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text('{"text": "one two three four"}\n' * 3, encoding="utf-8")
    made = load(str(path), num_samples=100, seq_len=4)
    assert 1 <= made.ids_NT.shape[0] < 100
    assert made.num_documents == 3


def test_hashes_follow_content() -> None:
    ids_NT = torch.arange(6).view(2, 3)
    assert tokens.ids_sha256(ids_NT) == tokens.ids_sha256(ids_NT.T.contiguous().T)
    assert len({tokens.ids_sha256(i) for i in (ids_NT, ids_NT.view(3, 2), ids_NT + 1)}) == 3
    assert texts.text_sha256(["ab"]) != texts.text_sha256(["a", "b"])
    # sha256 of "abc" as published in FIPS 180-4's examples
    assert texts.text_sha256(["abc"]).startswith("ba7816bf8f01cfea")


def test_no_default_without_network_says_what_to_pass() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(ConfigError, match=r"pile-val-backup.*, the default, could not be read .*--calib self"):
        load(None, is_reference=False)


def test_importing_it_is_fast() -> None:
    code = "import sys, compress.calibration; print({*sys.modules} & {'transformers', 'datasets', 'pyarrow'})"
    root = calibration_data.PROVENANCE.parents[1]
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert seen.stdout.strip() == "set()"


# the tokenizer


def test_tokenizer_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        tokens.load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        tokens.load_tokenizer(tmp_path)
    shutil.copytree(calibration_data.reference_model(), tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "m" / "tokenizer.json").write_text('{"broken"', encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be loaded .*put the model's tokenizer.json"):
        tokens.load_tokenizer(tmp_path / "m")


# text sampled from the model


def sample(model: Any, tokenizer: Any, **options: int) -> torch.Tensor:
    return sampling.sample_from_model(model, tokenizer, **({"num_samples": 6, "seq_len": 24, "seed": 3} | options))


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> tuple[Any, Any]:
    folder = shared_data / "stories260K"
    return sampling.load_model_float32(folder), tokens.load_tokenizer(folder)


def test_sample_depends_on_its_seed_and_on_no_batch(stories: tuple[Any, Any]) -> None:
    ids_NT = sample(*stories)
    assert ids_NT.shape == (6, 24) and ids_NT.dtype == torch.int64
    assert torch.equal(ids_NT, sample(*stories))
    assert torch.equal(ids_NT[:4], sample(*stories, num_samples=4, batch_size=2))
    assert not torch.equal(ids_NT, sample(*stories, seed=4))
    assert ids_NT[:, 0].eq(stories[1].bos_token_id).all()


def test_sampled_text_is_likelier_than_random_text(stories: tuple[Any, Any]) -> None:
    model, tokenizer = stories
    ids_NT = sample(model, tokenizer, num_samples=16, seq_len=64)
    random_NT = torch.randint(3, 512, ids_NT.shape, generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def nats(ids: torch.Tensor) -> tuple[float, float]:
        """Mean loss, and mean entropy of the predictions."""
        log_p = model(ids).logits[:, :-1].log_softmax(-1)
        loss = -log_p.gather(-1, ids[:, 1:, None]).mean().item()
        return loss, -(log_p.exp() * log_p).sum(-1).mean().item()

    loss, entropy = nats(ids_NT)
    # temperature 1 and nothing cut off: the expected loss is the entropy; 1008 draws, each spread 1.5 nats
    assert abs(loss - entropy) < 5 * 1.5 / 1008**0.5
    assert loss < nats(random_NT)[0] - 2


class Scripted:
    """A model that always puts all probability on the next id of a script."""

    device = torch.device("cpu")

    def __init__(self, script: list[int], vocab_size: int = 600) -> None:
        self._script = iter(script)
        self._vocab_size = vocab_size

    def __call__(self, *, input_ids: torch.Tensor, past_key_values: Any, use_cache: bool) -> Any:
        logits = torch.full((input_ids.shape[0], 1, self._vocab_size), -1e4)
        logits[..., 599] = 1e4  # a padding id behind the tokenizer's last
        logits[..., next(self._script)] = 1e3
        return type("Output", (), {"logits": logits, "past_key_values": None})


def test_a_new_text_begins_after_end_of_text_and_padding_is_never_drawn(stories: tuple[Any, Any]) -> None:
    tokenizer = stories[1]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    ids_NT = sample(Scripted([7, 2, 9, 8, 5]), tokenizer, num_samples=1, seq_len=6)
    assert ids_NT.tolist() == [[1, 7, 2, 1, 8, 5]]  # the 9 that was drawn after end-of-text gave way to BOS


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 1), (0.2499, 1), (0.25, 2), (0.9999999999, 2)])
def test_invert_never_draws_what_has_no_probability(uniform: float, expected: int) -> None:
    probability_BV = torch.tensor([[0.0, 0.25, 0.75, 0.0]], dtype=torch.float64)
    assert sampling._invert(probability_BV, torch.tensor([uniform], dtype=torch.float64)).item() == expected


def test_load_self(shared_data: Path) -> None:
    folder = shared_data / "stories260K"
    made = calibration.load(
        "self",
        tokens.load_tokenizer(folder),
        num_samples=2,
        seq_len=8,
        seed=0,
        model=folder,
        is_reference=False,
        vocab_size=512,
    )
    assert made.source == "self"
    assert made.ids_NT.shape == (2, 8)
    assert (made.num_documents, made.num_tokens_total, made.num_tokens_unused) == (2, 16, 0)


def test_self_refuses_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--calib self cannot load the model"):
        load("self", model=tmp_path)


def test_self_refuses_a_tokenizer_without_a_start() -> None:
    make: Callable[..., Any] = type(TOKENIZER)
    bare = make(tokenizer_file=str(calibration_data.reference_model() / "tokenizer.json"))
    assert bare.eos_token_id is None and bare.bos_token_id is None
    with pytest.raises(ConfigError, match="neither end-of-text nor BOS"):
        sample(Scripted([]), bare)
