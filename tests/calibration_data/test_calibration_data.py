"""The bundled files are what provenance.json says, and the sample can be made again."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import calibration_data
from calibration_data import sample_reference

FOLDER = calibration_data.PROVENANCE.parent
PROVENANCE = json.loads(calibration_data.PROVENANCE.read_text(encoding="utf-8"))


def recorded_hashes() -> dict[str, str]:
    return {name: digest for item in PROVENANCE.values() for name, digest in item["sha256"].items()}


def test_every_data_file_is_listed() -> None:
    files = (file for file in FOLDER.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    data = {f.relative_to(FOLDER).as_posix() for f in files if f.suffix not in {".py", ".md", ".typed"}}
    assert data - {"provenance.json"} == set(recorded_hashes())


@pytest.mark.parametrize("name", sorted(recorded_hashes()))
def test_sha256(name: str) -> None:
    assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == recorded_hashes()[name]


def test_provenance_agrees_with_the_script_and_the_file() -> None:
    said = PROVENANCE["self_sampled"]
    assert said["seed"] == sample_reference.SEED
    assert said["num_tokens_sampled"] == sample_reference.NUM_ROWS * sample_reference.ROW_TOKENS
    assert said["num_documents"] == calibration_data.default_calibration().read_bytes().count(b"\n")
    # far above float64 rounding of logits of about 10: else the file could differ between machines
    assert said["closest_call"] > 1e-9


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small products wait for each other on busy cores: with 2 threads it takes 4 times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_first_rows_of_the_sample_can_be_made_again(reference_model: Path) -> None:
    """A row does not depend on how many others there are, so the first rows are the first lines."""
    model = sample_reference.load_float64(reference_model)
    ids_BT, margin = sample_reference.sample_rows(model, num_rows=4, num_tokens=sample_reference.ROW_TOKENS)
    text = sample_reference.to_jsonl(ids_BT, reference_model).encode("utf-8")
    stored = calibration_data.default_calibration().read_bytes()
    assert text.count(b"\n") >= 4
    assert stored[: len(text)] == text
    assert margin >= PROVENANCE["self_sampled"]["closest_call"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_first_row_of_the_held_out_text_can_be_made_again(reference_model: Path) -> None:
    model = sample_reference.load_float64(reference_model)
    first = sample_reference.HELD_OUT_FIRST_ROW
    assert first >= sample_reference.NUM_ROWS
    ids_BT, _ = sample_reference.sample_rows(model, 1, sample_reference.ROW_TOKENS, first_row=first)
    text = sample_reference.to_jsonl(ids_BT, reference_model).encode("utf-8")
    stored = calibration_data.default_evaluation().read_bytes()
    assert len(text) > 1000
    assert stored[: len(text)] == text


def test_float64_forward_agrees_with_transformers(reference_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids_BT = torch.tensor([[0, 40, 513, 79, 199, 87], [0, 1344, 14, 221, 558, 805]])
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(str(reference_model), dtype=torch.float64)(ids_BT).logits
        decoder = sample_reference.Decoder(sample_reference.load_float64(reference_model), 2, ids_BT.shape[1])
        ours = torch.stack([decoder.step(ids_B) for ids_B in ids_BT.T], dim=1)
    # transformers computes norms and angles in float32 (2**-24 = 6e-8, over 6 blocks, logits of about 10)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("row", "documents"),
    [([5, 6], [[5, 6]]), ([5, 0, 6], [[5], [6]]), ([0, 5, 0], [[], [5], []])],
    ids=["one", "two", "empty"],
)
def test_rows_are_cut_at_end_of_text(row: list[int], documents: list[list[int]]) -> None:
    assert list(sample_reference.cut_documents(row)) == documents


def test_importing_it_imports_nothing_of_ours() -> None:
    code = "import sys, calibration_data; print({m.split('.')[0] for m in sys.modules} & {'torch', 'compress'})"
    command = [sys.executable, "-c", code]
    seen = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent, check=True)
    assert seen.stdout.strip() == "set()"
