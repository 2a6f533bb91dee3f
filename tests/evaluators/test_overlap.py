"""The text that a candidate was calibrated on is no evidence, however it is cut or packed."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from calibration_data import reference_model
from compress import calibration, tokens
from compress.artifact import Manifest, read_manifest, write_manifest
from compress.errors import ConfigError
from evaluators.overlap import refuse_calibration_text
from evaluators.windows import Windows, load_windows

TOKENIZER = tokens.load_tokenizer(reference_model())
WORDS = "the old house stood by the river and nobody had lived there for many years since the war".split()


def lines(seed: int, count: int) -> list[str]:
    dice = random.Random(seed)
    return [" ".join(dice.choice(WORDS) for _ in range(14)) for _ in range(count)]


def windows(path: Path, max_tokens: int = 4096) -> Windows:
    return load_windows(
        str(path), TOKENIZER, context=64, stride=None, min_context=None, bos="auto", max_tokens=max_tokens,
        model=reference_model(), vocab_size=4096,
    )  # fmt: skip


@pytest.fixture
def candidate(tmp_path: Path) -> Path:
    """A folder whose manifest says that its grandparent was calibrated on the first rows of a text."""
    path = tmp_path / "calibration.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines(0, 300)), encoding="utf-8")
    made = calibration.load(
        str(path), TOKENIZER, num_samples=32, seq_len=64, seed=0, model=reference_model(), is_reference=True,
        vocab_size=4096,
    )  # fmt: skip
    folder = tmp_path / "candidate"
    folder.mkdir()
    stages = [{"stage": "other"}, {"stage": "awq", "calibration": made.record()}]
    parent = {"path": "bundled:reference_lm", "sha256": ""}
    write_manifest(folder, Manifest(lineage=[{**stage, "parent": parent} for stage in stages], reports=[]))
    return folder


def refuse(candidate: Path, path: Path, **options: Any) -> list[str]:
    return refuse_calibration_text(candidate, windows(path, **options), TOKENIZER)


def test_the_same_file_is_refused_however_much_is_read(candidate: Path, tmp_path: Path) -> None:
    """Case: as a .jsonl, a hash of the documents that were read changes with their number."""
    for max_tokens in (512, 4096):
        with pytest.raises(ConfigError, match="is the text that .* was calibrated on; pass other text with --data"):
            refuse(candidate, tmp_path / "calibration.jsonl", max_tokens=max_tokens)


def rewritten(kind: str, path: Path, texts: list[str]) -> Path:
    if kind == "txt":
        path.write_text("\n".join(texts), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"n": i, "text": t}) + "\n" for i, t in enumerate(texts)), encoding="utf-8")
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({"text": texts}), path)
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("first", [0, 7], ids=["from the beginning", "shifted"])
def test_the_same_text_in_another_file_is_refused(candidate: Path, tmp_path: Path, kind: str, first: int) -> None:
    """Whatever stands between two rows."""
    path = rewritten(kind, tmp_path / f"other.{kind}", lines(0, 300)[first:])
    with pytest.raises(ConfigError, match=r"\d\d\.\d% of file:.* is text that .* was calibrated on \(file:"):
        refuse(candidate, path)


def test_a_watched_text_is_refused_as_well(tmp_path: Path, candidate: Path) -> None:
    manifest = read_manifest(candidate)
    assert manifest is not None
    first, second = manifest.lineage
    watched = second["calibration"]
    other = {**watched, "source": "file:other", "text_sha256": "0", "source_sha256": None, "passages": None}
    made = {**second, "calibration": {**other, "watched": watched}}
    write_manifest(candidate, Manifest(lineage=[first, made], reports=[]))
    with pytest.raises(ConfigError, match="was calibrated on"):
        refuse(candidate, tmp_path / "calibration.jsonl")


def test_a_part_is_refused_with_its_share(candidate: Path, tmp_path: Path) -> None:
    """Twenty of two hundred rows, anywhere among others: the share is said."""
    mixed = lines(1, 90) + lines(0, 300)[40:60] + lines(2, 90)
    with pytest.raises(ConfigError) as caught:
        refuse(candidate, rewritten("jsonl", tmp_path / "mixed.jsonl", mixed))
    assert 0.07 < float(str(caught.value).split("%")[0]) / 100 < 0.13


def test_other_text_is_accepted_and_a_quotation_is_noted(candidate: Path, tmp_path: Path) -> None:
    assert refuse(candidate, rewritten("jsonl", tmp_path / "other.jsonl", lines(3, 200))) == []
    quoting = lines(1, 100) + lines(0, 300)[40:43] + lines(2, 130)
    (note,) = refuse(candidate, rewritten("jsonl", tmp_path / "quoting.jsonl", quoting))
    assert 0 < float(note.split("%")[0]) < 1 and "is text that was calibrated on" in note


def test_a_folder_without_a_manifest_was_calibrated_on_nothing(tmp_path: Path, candidate: Path) -> None:
    assert refuse(tmp_path, tmp_path / "calibration.jsonl") == []
