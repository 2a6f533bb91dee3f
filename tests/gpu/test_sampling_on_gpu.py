"""Text sampled from a model by a CUDA graph of its step: the same as without, and the same again."""

import pytest
import torch

import calibration_data
from compress import drawing, sampling, tokens
from compress.tell import Heard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: sampling by a graph was not tested"),
]


def test_a_graph_draws_what_the_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = calibration_data.reference_model()
    model, tokenizer = sampling.load_model_float32(folder, "cuda"), tokens.load_tokenizer(folder)
    heard = Heard()

    def sample(batch_size: int) -> torch.Tensor:
        return sampling.sample_from_model(
            model, tokenizer, num_samples=48, seq_len=64, seed=3, batch_size=batch_size, tell=heard
        )

    graphed = sample(32)
    assert not [event for event in heard.events if "without a CUDA graph" in str(event)], heard.events
    assert torch.equal(sample(32), graphed)
    monkeypatch.setattr(sampling, "drawer_of", lambda model, num_ids, *_: drawing.Drawer(model, num_ids))
    plain = sample(32)
    # A row that once drew another token, by rounding, goes on with another text.
    assert float((plain[:, :8] == graphed[:, :8]).float().mean()) > 0.95
    assert float((plain == graphed).float().mean()) > 0.5
