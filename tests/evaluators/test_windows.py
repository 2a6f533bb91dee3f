"""Text as windows: where it comes from, what stands in front, and what does not fit the model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import tokens
from compress.errors import ConfigError
from compress.tell import Heard
from evaluators.windows import load_windows

OPTIONS: dict[str, Any] = {"context": 16, "stride": None, "min_context": None, "bos": "auto", "max_tokens": 96}
TEXT = "Once upon a time\n\nthere was a ship.\n   It sailed for the east,\nand came home.\n" * 9


@pytest.fixture
def stories(shared_data: Path) -> Any:
    folder = shared_data / "stories260K"
    return tokens.load_tokenizer(folder), {"model": folder, "vocab_size": 512}


def written(tmp_path: Path) -> tuple[Path, Path]:
    text, rows = tmp_path / "t.txt", tmp_path / "t.jsonl"
    text.write_text(TEXT, encoding="utf-8")
    rows.write_text(json.dumps({"text": TEXT}) + "\n", encoding="utf-8")
    return text, rows


@pytest.mark.parametrize("bos", ["auto", "never"])
def test_a_text_and_a_data_set_of_one_row_are_the_same_windows(tmp_path: Path, stories: Any, bos: str) -> None:
    """With BOS in front of each window and never two of them; without it, the text's own tokens and nothing else."""
    tokenizer, model = stories
    own = tokenizer(TEXT, add_special_tokens=False).input_ids
    for path in written(tmp_path):
        made = load_windows(str(path), tokenizer, **{**OPTIONS, **model, "bos": bos})
        ids = [s.ids_T.tolist() for s in made.sequences]
        front = [tokenizer.bos_token_id] if bos == "auto" else []
        body = 16 - len(front)
        assert ids == [front + own[i : i + body] for i in range(0, 96 - body + 1, body)]
        assert made.bos == bool(front)


def test_windows_sampled_from_the_original(stories: Any) -> None:
    """Case: one token over and over. Each window is a text of its own that begins as the model's texts begin."""
    tokenizer, model = stories
    heard = Heard()
    made = load_windows("self", tokenizer, **{**OPTIONS, **model}, tell=heard)
    rows = torch.stack([s.ids_T for s in made.sequences])
    assert rows.shape == (6, 16) and rows[:, 0].eq(tokenizer.bos_token_id).all()
    assert len(rows[:, 1:].unique()) > 20
    assert (made.source, made.source_sha256, made.num_scored) == ("self", None, 6 * 15)
    assert ("start", "sampled position", 16) in heard.events
    again = load_windows("self", tokenizer, **{**OPTIONS, **model})
    assert again.ids_sha256 == made.ids_sha256 == again.text_sha256
    for option in ({"stride": 8}, {"bos": "never"}):
        with pytest.raises(ConfigError, match="--data self samples each window from its beginning; leave out"):
            load_windows("self", tokenizer, **{**OPTIONS, **model, **option})


def test_windows_longer_than_the_model_are_refused(tmp_path: Path, stories: Any) -> None:
    tokenizer, model = stories
    text, _ = written(tmp_path)
    with pytest.raises(ConfigError, match=r"--context 513 .*max_position_embeddings 512 .*pass --context 512 or less"):
        load_windows(str(text), tokenizer, **{**OPTIONS, **model, "context": 513, "max_tokens": 2000})


def test_errors_of_the_text_speak_of_data(tmp_path: Path, stories: Any) -> None:
    tokenizer, model = stories
    (tmp_path / "short.txt").write_text("Once.", encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n', encoding="utf-8")
    for name, message in (
        ("short.txt", "gives 2 tokens, one window needs 15; pass more text, or --context 2"),
        ("empty.jsonl", "evaluation text .* gives no tokens; pass --data"),
        ("nowhere.txt", "evaluation file .* does not exist; pass --data"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            load_windows(str(tmp_path / name), tokenizer, **{**OPTIONS, **model})
        assert "calib" not in str(caught.value)


def test_a_model_is_needed_to_sample_from(tmp_path: Path, stories: Any) -> None:
    tokenizer, model = stories
    shutil.copy(model["model"] / "config.json", tmp_path / "config.json")
    with pytest.raises(ConfigError, match="cannot be loaded to sample text from it") as caught:
        load_windows("self", tokenizer, **{**OPTIONS, **model, "model": tmp_path})
    assert "--calib" not in str(caught.value)
