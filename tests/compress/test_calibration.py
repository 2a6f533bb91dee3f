"""From what the user names to rows of token ids, and what the manifest keeps of it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import calibration_data
from compress import calibration, sampling, texts, tokens
from compress.errors import ConfigError
from compress.passages import Passages
from compress.texts import EVALUATION

VOCAB = 4096
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


def test_bundled_text_fills_the_default_size() -> None:
    made = load(None, num_samples=128, seq_len=512)
    assert made.ids_NT.shape == (128, 512)
    assert made.source == "bundled:self_sampled"
    assert made.num_tokens_total == made.ids_NT.numel() + made.num_tokens_unused
    everything = texts.documents(str(calibration_data.default_calibration()))
    spare = sum(len(encode(text)) + 1 for text in everything) - 1 - 128 * 512
    assert 0.02 < spare / (128 * 512) < 0.05


def test_fewer_rows_than_asked_for_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text('{"text": "one two three four"}\n' * 3, encoding="utf-8")
    made = load(str(path), num_samples=100, seq_len=4)
    assert 1 <= made.ids_NT.shape[0] < 100
    assert made.num_documents == 3


def test_importing_it_is_fast() -> None:
    code = "import sys, compress.calibration; print({*sys.modules} & {'transformers', 'datasets', 'pyarrow'})"
    root = calibration_data.PROVENANCE.parents[1]
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert seen.stdout.strip() == "set()"


TEXT = "one two\n\nthree\n   four five six\n\n\nseven\n"


def test_a_text_file_gives_the_tokens_of_a_data_set_of_one_row(tmp_path: Path) -> None:
    text, rows = tmp_path / "notes.txt", tmp_path / "notes.jsonl"
    text.write_text(TEXT, encoding="utf-8")
    rows.write_text(json.dumps({"text": TEXT}) + "\n", encoding="utf-8")
    made, other = load(str(text), num_samples=2, seq_len=4), load(str(rows), num_samples=2, seq_len=4)
    assert made.ids_NT.flatten().tolist() == encode(TEXT)[:8] == other.ids_NT.flatten().tolist()
    assert (made.source, made.num_documents) == (f"file:{text}", 1)
    assert made.text_sha256 == other.text_sha256 == texts.text_sha256([TEXT])
    assert made.source_sha256 != other.source_sha256
    streams = [calibration.read_stream(str(p), TOKENIZER, max_tokens=8, vocab_size=VOCAB, purpose=EVALUATION)
               for p in (text, rows)]  # fmt: skip
    assert torch.equal(streams[0].ids_S, streams[1].ids_S) and streams[0].ids_S.tolist() == encode(TEXT)[:8]


def test_the_record_finds_the_text_again(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(" ".join(f"In {1800 + i} the ship sailed." for i in range(200)), encoding="utf-8")
    made = load(str(path), num_samples=3, seq_len=64)
    record = json.loads(json.dumps(made.record()))
    assert record["source_sha256"] == texts.source_sha256(str(path))
    assert (record["num_samples"], record["seq_len"], record["num_documents"]) == (3, 64, 1)
    kept = Passages.from_json(record["passages"])
    assert kept is not None
    found, told = kept.found_in(TOKENIZER.decode(made.ids_NT.flatten()))
    assert found == told > 300
    assert kept.found_in("another text altogether " * 9) == (0, 24 - 3)


def test_chats_are_written_out_by_the_template(tmp_path: Path) -> None:
    """Case: the only string column beside the messages is an id, which was calibrated on."""
    path = tmp_path / "chat.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"Tell me of {i}."}], "id": "x"} for i in range(9)]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    with pytest.raises(ConfigError, match="line 1, is a chat, and this model's tokenizer has no chat template"):
        load(str(path))
    tokenizer = tokens.load_tokenizer(calibration_data.reference_model())
    tokenizer.chat_template = "{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    made = calibration.load(
        str(path), tokenizer, num_samples=2, seq_len=16, seed=0, model=calibration_data.reference_model(),
        is_reference=True, vocab_size=VOCAB,
    )  # fmt: skip
    said = "".join(f"<|endoftext|>user: Tell me of {i}.\n" for i in range(9))
    assert made.ids_NT.flatten().tolist() == encode(said)[:32]


def test_rows_longer_than_the_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 128}', encoding="utf-8")
    for spec in (None, "self", "nowhere.txt"):
        with pytest.raises(ConfigError, match="--seq-len 256 .*max_position_embeddings 128 .*pass --seq-len 128"):
            load(spec, seq_len=256, model=tmp_path)


def test_without_a_text_small_models_are_sampled_from(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shared_data / "stories260K"
    options: dict[str, Any] = {
        "num_samples": 2, "seq_len": 8, "seed": 0, "model": folder, "is_reference": False, "vocab_size": 512,
    }  # fmt: skip
    tokenizer = tokens.load_tokenizer(folder)
    made = calibration.load(None, tokenizer, **options)
    assert made.source == "self"
    assert made.sha256 == calibration.load("self", tokenizer, **options).sha256
    monkeypatch.setattr(sampling, "LARGEST_ON_CPU", 1000)
    with pytest.raises(ConfigError, match=r"no --calib: .* more than the 0 GB .*pass --calib FILE.txt .*--calib self"):
        calibration.load(None, tokenizer, **options)
    assert calibration.load("self", tokenizer, **options).source == "self"


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
