"""Pruning on a GPU: the shape that the CPU chooses, about its divergence, equal bytes twice.

Passed on one H200, 2026-11-26, before hidden channels had a damping of their own.
"""

from pathlib import Path

import pytest
import torch

from compress.files import file_sha256
from compress.prune.decide import Asked
from compress.prune.prune_stage import PruneRequest, prune
from compress.stage import Outcome
from compress.workspace import resolve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: the GPU path was not tested"),
]


def run(model: Path, out: Path, device: str, asked: Asked) -> Outcome:
    request = PruneRequest(source=resolve(str(model)), out=out, asked=asked, samples=128, seq_len=256, device=device)
    return prune(request)


@pytest.mark.parametrize(
    "asked",
    [
        Asked(depth="1", intermediate="0.25"),
        Asked(hidden="0.25", heads="2"),
        Asked(params=9_000_000, candidates=2),
    ],
)
def test_the_gpu_prunes_as_the_cpu_does(reference_model: Path, tmp_path: Path, asked: Asked) -> None:
    cpu = run(reference_model, tmp_path / "cpu", "cpu", asked)
    gpu, again = (run(reference_model, tmp_path / name, "cuda", asked) for name in ("one", "two"))
    assert gpu.record["shape"] == cpu.record["shape"] and gpu.record["kept_blocks"] == cpu.record["kept_blocks"]
    found, expected = (outcome.record["divergence"]["held_out"] for outcome in (gpu, cpu))
    assert found == pytest.approx(expected, rel=0.25)
    assert [file_sha256(p) for p in sorted(gpu.out.glob("*.safetensors"))] == [
        file_sha256(p) for p in sorted(again.out.glob("*.safetensors"))
    ]
