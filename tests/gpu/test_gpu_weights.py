"""Folders run by the decode kernels: the model's own logits, and the same ids with and without graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import UnsupportedError
from compress.quantize.awq_stage import AwqRequest, quantize_awq
from compress.quantize.int8_stage import Int8Request, quantize_int8
from compress.runtime.gpu_decoder import GpuDecoder
from compress.runtime.gpu_weights import open_decoder
from compress.runtime.runner import Tokens
from compress.runtime.streamed import TorchRunner
from compress.scheme import Scheme
from compress.workspace import resolve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: the decode kernels were not tested"),
]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, reference_model: Path) -> Path:
    """The reference model in INT4, groups of 64, zero points of their own."""
    out = tmp_path_factory.mktemp("int4") / "artifact"
    scheme = Scheme(group_size=64)
    source = resolve(str(reference_model))
    quantize_awq(
        AwqRequest(source=source, out=out, scheme=scheme, samples=4, seq_len=128, device="cuda", effort="fast")
    )
    return out


def streamed_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    reading = TorchRunner.open(folder, device="cuda").read([Tokens(ids_T=torch.tensor(ids))])
    logits = reading.logits(0, len(ids) - 1, len(ids))[0]
    reading.close()
    return logits.cpu()


def test_an_artifact_and_its_original(reference_model: Path, artifact: Path) -> None:
    """INT4 codes in the kernel, and float16: what the streamed model computes from the same folder."""
    ids = list(range(5, 2005, 50))
    for folder in (reference_model, artifact):
        decoder = open_decoder(folder, capacity=256)
        assert decoder.weights.layers[0].qkv.num_bits == (16 if folder == reference_model else 4)
        decoder.prefill(torch.tensor([ids[:20]], device="cuda"))
        for token in ids[20:]:
            found = decoder.step(torch.tensor([token], device="cuda"))
        wanted = streamed_logits(folder, ids)
        assert float((found[0].float().cpu() - wanted).norm() / wanted.norm()) < 5e-3


def test_int8_inputs(tmp_path: Path, reference_model: Path) -> None:
    """W8A8 by token: opening proves weights and rounding; a graph changes no id. Not run yet."""
    source = resolve(str(reference_model))
    folder = quantize_int8(
        Int8Request(source=source, out=tmp_path / "int8", samples=4, seq_len=128, device="cuda", effort="fast")
    ).out
    ids = torch.arange(3, 33, device="cuda")[None]
    seen = []
    for graphs in (True, False):
        decoder = open_decoder(folder, capacity=256, graphs=graphs)
        assert decoder.weights.layers[0].rounded == {"qkv", "o", "gate_up", "down"}
        assert decoder.weights.layers[0].qkv.num_bits == 8
        decoder.prefill(ids)
        seen.append(decoder.greedy(80).tolist())
    assert seen[0] == seen[1]


@pytest.mark.parametrize("prompt", [1, 30, 100])
def test_graphs_change_no_id(artifact: Path, prompt: int) -> None:
    ids = torch.arange(3, 3 + prompt, device="cuda")[None]
    seen = []
    for graphs in (True, False):
        decoder: GpuDecoder = open_decoder(artifact, capacity=256, graphs=graphs)
        decoder.prefill(ids)
        seen.append(decoder.greedy(80).tolist())
        assert (decoder.graph is not None and decoder.graph.replays == 80) == graphs
    assert seen[0] == seen[1] and len(set(seen[0][0])) > 4


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Mistral"])
def test_other_families(family: str, build_model: Any) -> None:
    """Biases, norms of queries and keys: opening proves the logits."""
    open_decoder(build_model(family, dtype="float16", head_dim=64), capacity=64)


def test_what_it_cannot_run_is_refused(build_model: Any) -> None:
    with pytest.raises(UnsupportedError, match="gemma2 is not among"):
        open_decoder(build_model("Gemma2", dtype="float16"), capacity=64)
