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


def test_windows_that_hold_the_whole_row_are_captured_too() -> None:
    """Gemma 3, whose windows hold 512 tokens: every position as the model draws it, but for rounding."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=256, sliding_window=64, layer_types=kinds,
    )  # fmt: skip
    torch.manual_seed(0)
    model, heard = Gemma3ForCausalLM(config).eval().cuda(), Heard()
    with torch.inference_mode():
        graphed = drawing.drawer_of(model, 256, 8, 64, heard)
        assert isinstance(graphed, drawing.FixedDrawer), heard.events
        plain = drawing.Drawer(model, 256)
        uniform_BT, ids_BT = torch.rand(8, 64, dtype=torch.float64), torch.randint(0, 256, (8, 64))
        graphed.begin(uniform_BT)
        plain.begin(uniform_BT)
        same = [
            one == other
            for t in range(64)
            for one, other in zip(*(d.draw(ids_BT[:, t : t + 1], t) for d in (graphed, plain)), strict=True)
        ]
    assert sum(same) > 0.98 * len(same)
