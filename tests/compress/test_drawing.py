"""Next ids of many rows: with a cache that grows, and with one that stays where it is."""

from typing import Any

import pytest
import torch

import calibration_data
from compress import drawing, sampling, tokens

TOKENIZER = tokens.load_tokenizer(calibration_data.reference_model())


def sample(model: Any) -> torch.Tensor:
    return sampling.sample_from_model(model, TOKENIZER, num_samples=6, seq_len=20, seed=3, batch_size=3)


def test_a_cache_that_stays_where_it_is_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU captures, on the CPU: the same ids but where a number lies on a bound; also begun anew."""
    model = sampling.load_model_float32(calibration_data.reference_model())
    with torch.inference_mode():
        fixed = drawing.FixedDrawer(model, len(TOKENIZER), 3, 20)
        assert fixed.has_fixed_layers
        for _ in range(2):
            assert drawing.draws_alike(fixed, drawing.Drawer(model, len(TOKENIZER)), 3)
    plain = sample(model)
    monkeypatch.setattr(sampling, "drawer_of", lambda *_: fixed)
    assert float((sample(model) == plain).float().mean()) > 0.8


class Behind(drawing.Drawer):
    def draw(self, ids_B1: torch.Tensor, position: int) -> list[int]:
        return super().draw(ids_B1, max(0, position - 1))


class Disturbed(drawing.Drawer):
    """Moves the bounds between many ids by about the part of one."""

    def _drawn(self, logits_B1V: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        noise_B1V = torch.randn(logits_B1V.shape, generator=generator)
        return super()._drawn(logits_B1V + 0.01 * noise_B1V, uniform_B)


class NotANumber(drawing.Drawer):
    def _logits(self, ids_B1: torch.Tensor) -> torch.Tensor:
        return super()._logits(ids_B1) * float("nan")


def test_a_drawer_that_is_a_token_behind_is_found_out() -> None:
    model = sampling.load_model_float32(calibration_data.reference_model())
    with torch.inference_mode():
        plain = drawing.Drawer(model, len(TOKENIZER))
        assert not drawing.draws_alike(Behind(model, len(TOKENIZER)), plain, 3)


def flat(num_ids: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": num_ids, "num_hidden_layers": 1})).eval()


def test_ids_next_to_the_right_ones_are_right_and_others_are_not() -> None:
    """Among many ids with about the same probability, rounding draws many neighbours."""
    num_rows, num_ids = 16, 50_000
    model = flat(num_ids)
    uniform_BT = torch.rand(num_rows, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids_B1 = torch.arange(num_rows)[:, None]
    with torch.inference_mode():
        plain, disturbed = drawing.Drawer(model, num_ids), Disturbed(model, num_ids)
        plain.begin(uniform_BT)
        disturbed.begin(uniform_BT)
        pairs = zip(plain.draw(ids_B1, 0), disturbed.draw(ids_B1, 0), strict=True)
        assert sum(one != other for one, other in pairs) > 1
        assert drawing.draws_alike(disturbed, plain, num_rows)
        assert plain.cache is None
        assert not drawing.draws_alike(Behind(model, num_ids), plain, num_rows)
        broken = NotANumber(model, num_ids)
        assert not drawing.draws_alike(plain, broken, num_rows)


def test_off_is_the_distance_to_the_part_of_the_id() -> None:
    model = flat(64)
    uniform_BT = torch.tensor([[0.0], [0.5], [0.999]], dtype=torch.float64)
    ids_B1 = torch.tensor([[1], [2], [3]])
    with torch.inference_mode():
        plain = drawing.Drawer(model, 64)
        plain.begin(uniform_BT)
        drawn = plain.draw(ids_B1, 0)
        plain.begin(uniform_BT)
        assert plain.off(ids_B1, 0, drawn).tolist() == [0, 0, 0]
        assert plain.cache.get_seq_length() == 1
        plain.begin(uniform_BT)
        off_B = plain.off(ids_B1, 0, [63, 63, 0])
        cumulative_BV = model(ids_B1).logits[:, -1].double().softmax(-1).cumsum(-1)
    expected = [cumulative_BV[0, 62], cumulative_BV[1, 62] - 0.5, 0.999 - cumulative_BV[2, 0]]
    assert off_B.dtype == torch.float64
    assert off_B.tolist() == pytest.approx([float(distance) for distance in expected], abs=1e-6)


SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}


def gemma(window: int) -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=16, sliding_window=window, layer_types=kinds)
    torch.manual_seed(0)
    return Gemma3ForCausalLM(config).eval()


@pytest.mark.parametrize("seq_len", [20, 24])
def test_a_window_that_holds_the_whole_row_slides_nowhere(seq_len: int) -> None:
    """As the model draws without, to the last position."""
    model = gemma(window=24)
    with torch.inference_mode():
        fixed, plain = drawing.FixedDrawer(model, 64, 3, seq_len), drawing.Drawer(model, 64)
        assert fixed.has_fixed_layers
        assert drawing.draws_alike(fixed, plain, 3)
        uniform_BT = torch.rand(3, seq_len, dtype=torch.float64)
        fixed.begin(uniform_BT)
        plain.begin(uniform_BT)
        ids_BT = torch.randint(0, 64, (3, seq_len))
        both = [(fixed.draw(ids_BT[:, t : t + 1], t), plain.draw(ids_BT[:, t : t + 1], t)) for t in range(seq_len)]
    assert sum(one != other for one, other in both) <= 1  # a number may lie on a bound


@pytest.mark.parametrize("window", [8, 23])
def test_layers_that_count_on_the_host_are_told(window: int) -> None:
    with torch.inference_mode():
        assert not drawing.FixedDrawer(gemma(window), 64, 2, 20).has_fixed_layers


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 1), (0.2499, 1), (0.25, 2), (0.9999999999, 2)])
def test_invert_never_draws_what_has_no_probability(uniform: float, expected: int) -> None:
    probability_BV = torch.tensor([[0.0, 0.25, 0.75, 0.0]], dtype=torch.float64)
    assert drawing.invert(probability_BV, torch.tensor([uniform], dtype=torch.float64)).item() == expected
