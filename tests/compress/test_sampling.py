"""Text sampled from the model itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import calibration_data
from compress import sampling, tokens
from compress.errors import ConfigError
from compress.tell import Heard

TOKENIZER = tokens.load_tokenizer(calibration_data.reference_model())


def sample(model: Any, tokenizer: Any, **options: int) -> torch.Tensor:
    return sampling.sample_from_model(model, tokenizer, **({"num_samples": 6, "seq_len": 24, "seed": 3} | options))


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> tuple[Any, Any]:
    folder = shared_data / "stories260K"
    return sampling.load_model_float32(folder), tokens.load_tokenizer(folder)


def test_sample_depends_on_its_seed_and_on_no_batch(stories: tuple[Any, Any]) -> None:
    ids_NT = sample(*stories)
    assert ids_NT.shape == (6, 24) and ids_NT.dtype == torch.int64
    assert torch.equal(ids_NT, sample(*stories))
    assert torch.equal(ids_NT[:4], sample(*stories, num_samples=4, batch_size=2))
    assert not torch.equal(ids_NT, sample(*stories, seed=4))
    assert ids_NT[:, 0].eq(stories[1].bos_token_id).all()


def test_sampled_text_is_likelier_than_random_text(stories: tuple[Any, Any]) -> None:
    model, tokenizer = stories
    ids_NT = sample(model, tokenizer, num_samples=16, seq_len=64)
    random_NT = torch.randint(3, 512, ids_NT.shape, generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def nats(ids: torch.Tensor) -> tuple[float, float]:
        """Mean loss, and mean entropy of the predictions."""
        log_p = model(ids).logits[:, :-1].log_softmax(-1)
        loss = -log_p.gather(-1, ids[:, 1:, None]).mean().item()
        return loss, -(log_p.exp() * log_p).sum(-1).mean().item()

    loss, entropy = nats(ids_NT)
    # temperature 1 and nothing cut off: the expected loss is the entropy; 1008 draws, each spread 1.5 nats
    assert abs(loss - entropy) < 5 * 1.5 / 1008**0.5
    assert loss < nats(random_NT)[0] - 2


class Scripted:
    """A model that always puts all probability on the next id of a script."""

    device = torch.device("cpu")

    def __init__(self, script: list[int], vocab_size: int = 600) -> None:
        self._script = iter(script)
        self._vocab_size = vocab_size

    def __call__(self, *, input_ids: torch.Tensor, past_key_values: Any, use_cache: bool) -> Any:
        logits = torch.full((input_ids.shape[0], 1, self._vocab_size), -1e4)
        logits[..., 599] = 1e4  # a padding id behind the tokenizer's last
        logits[..., next(self._script)] = 1e3
        return type("Output", (), {"logits": logits, "past_key_values": None})


def test_a_new_text_begins_after_end_of_text_and_padding_is_never_drawn(stories: tuple[Any, Any]) -> None:
    tokenizer = stories[1]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    ids_NT = sample(Scripted([7, 2, 9, 8, 5]), tokenizer, num_samples=1, seq_len=6)
    assert ids_NT.tolist() == [[1, 7, 2, 1, 8, 5]]  # the 9 that was drawn after end-of-text gave way to BOS


def test_how_far_it_is_can_be_heard(stories: tuple[Any, Any]) -> None:
    heard = Heard()
    sampling.sample_from_model(*stories, num_samples=3, seq_len=4, seed=0, batch_size=2, tell=heard)
    assert heard.events[0] == ("start", "sampled position", 8)
    assert [event[1] for event in heard.events[1:]] == list(range(1, 9))


def test_only_small_models_are_sampled_from_unasked(reference_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sampling.may_sample_from(reference_model, "cpu") is None
    monkeypatch.setattr(sampling, "LARGEST_ON_CPU", 21_000_000)
    refusal = sampling.may_sample_from(reference_model, "cpu")
    assert refusal is not None and "0.0 GB of weights" in refusal and "on cpu" in refusal
    assert sampling.may_sample_from(reference_model, "cuda:0") is None


@pytest.mark.parametrize(("seq_len", "rows"), [(512, 256), (2048, 84), (2**20, 1)])
def test_rows_at_once_fit_their_cache(seq_len: int, rows: int) -> None:
    """SmolLM2-135M's 30 blocks of 3 key heads of 64: 46,080 bytes a token in float32, of 8 GB; 32 rows on a CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576, intermediate_size=64, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sampling.rows_at_once(model, seq_len) == rows
    assert sampling.rows_at_once(model.to_empty(device="cpu"), seq_len) == 32


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded to sample text from it"):
        sampling.sample_from_folder(tmp_path, TOKENIZER, num_samples=1, seq_len=2, seed=0)


def test_a_tokenizer_without_a_start_is_refused() -> None:
    make: Callable[..., Any] = type(TOKENIZER)
    bare = make(tokenizer_file=str(calibration_data.reference_model() / "tokenizer.json"))
    assert bare.eos_token_id is None and bare.bos_token_id is None
    with pytest.raises(ConfigError, match="neither end-of-text nor BOS"):
        sample(Scripted([]), bare)
