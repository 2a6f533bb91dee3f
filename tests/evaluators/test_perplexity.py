"""Streamed scores against transformers' own loss."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import ArtifactError
from compress.model import StreamedModel
from evaluators.perplexity import window_nll


def test_equals_transformers(reference_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, 4096, (3, 40), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(reference_model, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = [float(model(row[None], labels=row[None]).loss) for row in ids]
    scores = window_nll(StreamedModel.open(reference_model), ids)
    torch.testing.assert_close(scores.nll_N, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    assert scores.perplexity == pytest.approx(math.exp(sum(expected) / 3), rel=1e-5)
    assert scores.tokens_per_window == 39


@pytest.mark.slow
def test_known_perplexity_of_the_reference_model(reference_model: Path, shared_data: Path) -> None:
    """The model card's 20.186 on WikiText-2 raw test, context 512, first 200 windows, float32."""
    from compress import calibration

    text = (shared_data / "wikitext-2" / "wiki.test.raw").read_text(encoding="utf-8")
    tokenizer = calibration.load_tokenizer(reference_model)
    ids = torch.tensor([i for line in text.split("\n")[:1600] for i in tokenizer(line + "\n").input_ids])
    scores = window_nll(StreamedModel.open(reference_model), ids[: 200 * 512].view(200, 512))
    assert scores.perplexity == pytest.approx(20.186, abs=0.002)


def test_nan_names_the_block(build_model: Any) -> None:
    from safetensors.torch import load_file, save_file

    folder = build_model()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38)  # finite weights whose products overflow
    save_file(tensors, folder / "model.safetensors")
    ids = torch.randint(0, 4096, (1, 16), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ArtifactError, match="model.layers.1 is the first block whose output is not finite"):
        window_nll(StreamedModel.open(folder), ids)
