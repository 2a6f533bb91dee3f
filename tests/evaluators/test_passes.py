"""Both models over the same sequences, part by part."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import calibration_data
from compress.runtime.runner import Tokens
from compress.runtime.streamed import TorchRunner
from compress.tell import Heard
from evaluators import passes
from evaluators.passes import Keep, Passed, Question


def questions(*lengths: int) -> list[Question]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 4096, (n,), generator=generator) for n in lengths]
    return [Question(tokens=Tokens(ids_T=row, first=0), target=row[1:]) for row in rows]


def run(folders: tuple[Path, Path], asked: list[Question], **options: Any) -> Passed:
    runners = dict(zip(("reference", "candidate"), map(TorchRunner.open, folders), strict=True))
    return passes.run(runners, asked, num_windows=3, weight_bytes=0, **options)


@pytest.fixture
def pair(build_model: Any) -> tuple[Path, Path]:
    return build_model(name="a"), build_model(name="b", rms_norm_eps=1e-2)


def test_parts_leave_no_trace(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = questions(40, 40, 40, 7, 25, 3)
    whole = run(pair, asked)
    monkeypatch.setattr(passes, "LEAST_BYTES", 40 * 64 * 4)
    heard = Heard()
    parts = run(pair, asked, tell=heard)
    assert any("(part 2 of 2)" in event[2] for event in heard.events if event[0] == "step")
    for one, other in zip(whole.answers, parts.answers, strict=True):
        torch.testing.assert_close(one.nll_candidate_P, other.nll_candidate_P, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.kl_P, other.kl_P, rtol=1e-3, atol=1e-5)
    assert [e.mse for e in parts.inside.errors] == pytest.approx([e.mse for e in whole.inside.errors], rel=0.5)
    assert len(parts.inside.internals) == 2 and not parts.notes


def test_percents_rise_to_the_end(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Also where the reference's share costs nothing, since it was kept."""
    asked = questions(40, 40, 40, 7)
    for _ in range(2):
        heard = Heard()
        run(pair, asked, keep=Keep(folder=tmp_path, model_sha256="a"), tell=heard)
        assert heard.events[0] == ("start", "percent of the evaluation", 100)
        done = [event[1] for event in heard.events[1:] if event[1] is not None]
        assert done == sorted(set(done)) and done[-1] == 100
    assert "reference, read back" in [event[2] for event in heard.events[1:]]


MEASURE = """
import sys
from pathlib import Path
from compress.cli.progress import peak_memory_bytes
from evaluators.evaluate import evaluate
from evaluators.request import EvaluationRequest
folder, text = Path(sys.argv[1]), sys.argv[2]
def judge(max_tokens):
    evaluate(EvaluationRequest(candidate=folder, reference=folder, data=text, context=512, max_tokens=max_tokens))
judge(512)
before = peak_memory_bytes()
judge(4096)
print(peak_memory_bytes() - before)
"""


def test_memory_follows_neither_the_vocabulary_nor_the_text(build_model: Any) -> None:
    """65536 ids, 1 GB of logits for the 8 windows of the longer text in each model: a few tens of MB more."""
    folder = build_model(vocab_size=65_536, max_position_embeddings=512)
    args = [sys.executable, "-c", MEASURE, str(folder), str(calibration_data.default_evaluation())]
    root = Path(passes.__file__).resolve().parents[1]
    seen = subprocess.run(args, capture_output=True, text=True, check=True, cwd=root)
    assert int(seen.stdout) < 100e6
