"""The whole quantizer on a GPU: the same bytes twice, and nearly the artifact that the CPU makes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from compress import numerics
from compress.calibration_rows import Text, read_rows
from compress.files import file_sha256
from compress.model import StreamedModel
from compress.quantize.awq_stage import AwqRequest, quantize_awq
from compress.quantize.end_to_end import held_out
from compress.scheme import Scheme
from compress.stage import Outcome
from compress.statistics import InputStatistics
from compress.workspace import resolve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: the GPU path was not tested"),
]


def quantize(model: Path, out: Path, samples: int = 16, **options: Any) -> Outcome:
    source = resolve(str(model))
    return quantize_awq(AwqRequest(source=source, out=out, scheme=Scheme(), samples=samples, seq_len=256, **options))


def summed_error(outcome: Outcome) -> float:
    return float(sum(layer["error"] for layer in outcome.record["layers"]))


def test_float32_on_the_gpu_is_nearly_the_artifact_of_the_cpu(reference_model: Path, tmp_path: Path) -> None:
    """Sums in another order move a few ranges and scales by a step, and codes with them, never the error."""
    for effort in ("fast", "balanced"):
        full = {
            d: quantize(reference_model, tmp_path / f"{effort}-{d}", device=d, effort=effort) for d in ("cpu", "cuda")
        }
        assert summed_error(full["cuda"]) == pytest.approx(summed_error(full["cpu"]), rel=2e-2)


def test_bfloat16_passes_find_the_same_folds_and_nearly_the_error(reference_model: Path, tmp_path: Path) -> None:
    exact = quantize(reference_model, tmp_path / "float32", device="cuda", effort="fast")
    coarse = quantize(reference_model, tmp_path / "bfloat16", device="cuda", dtype="bfloat16", effort="fast")
    folds = [[g["fold"] for g in o.record["groups"]] for o in (exact, coarse)]
    assert folds[0] == folds[1] and all(folds[0])
    assert summed_error(coarse) == pytest.approx(summed_error(exact), rel=0.05)


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_same_bytes_twice(effort: str, reference_model: Path, tmp_path: Path) -> None:
    first, second = (
        quantize(reference_model, tmp_path / n, device="cuda", dtype="bfloat16", effort=effort).out for n in "ab"
    )
    assert [file_sha256(p) for p in sorted(first.iterdir())] == [file_sha256(p) for p in sorted(second.iterdir())]


def test_values_are_added_at_their_index_as_on_the_cpu() -> None:
    """Many to an index: left to the GPU, the last bits differ from call to call."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 64, (100_000,), generator=generator)
    values = torch.randn(100_000, generator=generator)
    expected = numerics.add_by_index_(torch.zeros(64), index, values)
    for _ in range(20):
        found = numerics.add_by_index_(torch.zeros(64, device="cuda"), index.cuda(), values.cuda())
        assert torch.equal(found.cpu(), expected)


def test_tuning_lowers_the_held_out_error(reference_model: Path, tmp_path: Path) -> None:
    """On the CPU these 64 rows and 100 steps lower it in all six blocks; a few rows and steps do not."""
    asked: dict[str, Any] = {"effort": "best", "self_samples": 0, "tune_steps": 100, "samples": 64, "end_to_end": 0}
    outcome = quantize(reference_model, tmp_path / "best", device="cuda", dtype="bfloat16", **asked)
    assert sum(t["kept"] for t in outcome.record["tuning"]) >= 5


def test_learning_through_the_whole_model_lowers_the_divergence_and_repeats(
    reference_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes twice, blocks computed again in the backward pass or not; what is judged is the artifact's."""
    asked: dict[str, Any] = {"effort": "best", "self_samples": 0, "tune_steps": 20, "samples": 32, "end_to_end": 40}
    made = [quantize(reference_model, tmp_path / n, device="cuda", dtype="float32", **asked) for n in "ab"]
    hashes = [[file_sha256(p) for p in sorted(m.out.iterdir())] for m in made]
    assert hashes[0] == hashes[1]
    monkeypatch.setattr("compress.quantize.end_to_end_stage.KEPT_ON_GPU", 0)
    again = quantize(reference_model, tmp_path / "c", device="cuda", dtype="float32", **asked)
    assert [file_sha256(p) for p in sorted(again.out.iterdir())] == hashes[0]
    report = made[0].record["end_to_end"]
    assert report["kept"] and report["held_out_kl_learned"] < 0.99 * report["held_out_kl"]
    text = Text(samples=32, seq_len=256)
    ids = read_rows(text, StreamedModel.open(reference_model), is_reference=True).ids_NT[held_out(32)].cuda()
    logits = []
    for folder in (reference_model, made[0].out):
        model = StreamedModel.open(folder, device="cuda")
        model.load_whole()
        with torch.no_grad():
            logits.append(model.model(ids, use_cache=False).logits.double().log_softmax(-1))
    found = float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())
    assert found == pytest.approx(report["held_out_kl_learned"], rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gram_matrix_is_accurate(dtype: torch.dtype) -> None:
    """Against float64, relative to the norms of the two channels; 16-bit inputs included, whose products are exact."""
    generator = torch.Generator().manual_seed(0)
    x_TI = (torch.randn(8192, 1536, generator=generator) * torch.randn(1536, generator=generator).exp()).to(dtype)
    statistics = InputStatistics.empty(1536, torch.device("cuda"))
    for part in x_TI.cuda().split(2048):
        statistics.add(part)
    statistics.finish()
    exact = (x_TI.double().t() @ x_TI.double()) / len(x_TI)
    norm = exact.diagonal().sqrt()
    error = ((statistics.gram_II.cpu().double() - exact) / (norm[:, None] * norm[None])).abs().max()
    # The matrix unit sums 16-bit products in float32, but truncates where float32 arithmetic rounds.
    assert float(error) < (1e-5 if dtype == torch.float32 else 1e-4)
    assert torch.equal(statistics.gram_II, statistics.gram_II.t())
