"""Every decoder gives, step by step, the logits that transformers gives for the whole text at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.errors import ArtifactError, ConfigError
from compress.runtime.open import open_decoder
from compress.runtime.ort_decoder import OrtDecoder
from compress.runtime.resident import TorchDecoder
from compress.runtime.runner import Decoder

IDS = torch.tensor([[5, 80, 300, 12, 7, 900, 41, 3], [9, 2, 77, 1500, 8, 8, 60, 33]])


def whole(folder: Path, ids: Tensor) -> Tensor:
    """Logits `[B, T, V]` of transformers' own model."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        out: Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    return out


def check(decoder: Decoder, wanted: Tensor, ids: Tensor, tolerance: float) -> None:
    for _ in range(2):  # a second prompt starts anew
        found = [decoder.prefill(ids[:, :5]).float()]
        found += [decoder.step(ids[:, t]).float() for t in range(5, ids.shape[1])]
        for t, logits in enumerate(found, start=4):
            error = (logits - wanted[:, t]).norm() / wanted[:, t].norm()
            assert float(error) < tolerance, t


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Phi3", "GPTNeoX"])
def test_torch_decoder(family: str, build_model: Any) -> None:
    drop = {"Phi3": ("head_dim",), "GPTNeoX": ("head_dim", "num_key_value_heads")}.get(family, ())
    folder = build_model(family, drop=drop)
    decoder = TorchDecoder.open(folder, capacity=16, batch=2)
    check(decoder, whole(folder, IDS), IDS, 1e-5)
    assert decoder.vocab_size == 4096 and decoder.bytes_a_token > 0


def test_onnx_decoder_with_fixed_caches(reference_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from exporters.trt.graph.write import write_graph

    (tmp_path / "out").mkdir()
    write_graph(reference_model, tmp_path / "out", opset=24, capacity=64)
    decoder = open_decoder(tmp_path / "out", capacity=32, batch=2)
    assert isinstance(decoder, OrtDecoder) and decoder.capacity == 64
    check(decoder, whole(reference_model, IDS), IDS, 5e-3)  # float16 arithmetic
    with pytest.raises(ConfigError, match="65 tokens are asked for and its caches hold 64"):
        open_decoder(tmp_path / "out", capacity=65)


def test_advance_is_the_greedy_step(reference_model: Path) -> None:
    one, other = (TorchDecoder.open(reference_model, capacity=32) for _ in range(2))
    ids = IDS[:1]
    logits = one.prefill(ids)
    other.prefill(ids)
    for _ in range(6):
        logits = one.step(logits.argmax(-1))
        assert torch.equal(other.advance(), logits.argmax(-1))


def test_a_tied_output_matrix_is_one_tensor(reference_model: Path) -> None:
    decoder = TorchDecoder.open(reference_model, capacity=8)
    model: Any = decoder.model.model
    tied = model.config.tie_word_embeddings
    same = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert same == tied


def test_what_cannot_be_decoded_is_refused(reference_model: Path, tmp_path: Path) -> None:
    decoder = TorchDecoder.open(reference_model, capacity=9)
    decoder.prefill(IDS[:1])
    decoder.step(IDS[:1, 0])
    with pytest.raises(ConfigError, match="10 tokens do not fit a cache of 9"):
        decoder.step(IDS[:1, 0])
    positions = int(decoder.model.model.config.max_position_embeddings)
    with pytest.raises(ConfigError, match=f"the model was made for {positions}"):
        TorchDecoder.open(reference_model, capacity=positions + 1)
    with pytest.raises(ArtifactError, match="neither safetensors nor an .onnx graph"):
        open_decoder(tmp_path, capacity=8)
    (tmp_path / "other.engine").touch()
    with pytest.raises(ArtifactError, match="holds a TensorRT engine that is not called model.engine"):
        open_decoder(tmp_path, capacity=8)
