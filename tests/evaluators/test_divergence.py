"""Divergence, runner and windows against transformers and slow float64 arithmetic."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress import tokens
from compress.errors import ArtifactError, ConfigError
from compress.runtime import streamed as torch_runner
from compress.runtime.runner import Tokens
from compress.runtime.streamed import TorchRunner
from compress.runtime.watch import watchable
from evaluators import divergence
from evaluators.divergence import compare, kl_histogram, mean_interval, metrics
from evaluators.internals import block_errors, block_internals
from evaluators.windows import Windows, cut, load_windows


def sequences(*lengths: int, first: int = 0) -> list[Tokens]:
    generator = torch.Generator().manual_seed(0)
    return [Tokens(ids_T=torch.randint(0, 4096, (n,), generator=generator), first=first) for n in lengths]


def windows_of(rows: list[Tokens], min_context: int = 1) -> Windows:
    n = len(rows[0].ids_T)
    return Windows(
        sequences=rows, context=n, stride=n, min_context=min_context, bos=False, source="", text_sha256="",
        source_sha256=None, ids_sha256="", num_bytes=100,
    )  # fmt: skip


def whole_logits(folder: Path, rows: list[Tokens]) -> list[torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(row.ids_T[None]).logits[0] for row in rows]


@pytest.mark.parametrize("sliced", [False, True], ids=["whole", "sliced"])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GPTNeoX"])
def test_logits_of_any_lengths_equal_transformers(
    build_model: Any, family: str, sliced: bool, monkeypatch: Any
) -> None:
    """Batches, padding, several rounds and slices of the vocabulary leave no trace, nor does Gemma 2's soft cap."""
    folder = build_model(family)
    rows = sequences(40, 3, 41, 17, 40, 1, 100)
    rows[2] = Tokens(ids_T=rows[2].ids_T, first=30)
    monkeypatch.setattr(torch_runner, "HIDDEN_BYTES", 64 * 4 * 90)
    monkeypatch.setitem(torch_runner.LOGIT_BYTES, "cpu", 4 * torch_runner.POSITIONS * (700 if sliced else 10_000))
    reading = TorchRunner.open(folder).read(rows)
    assert reading.ids_at_once == (700 if sliced else 4096)
    for i, (row, expected) in enumerate(zip(rows, whole_logits(folder, rows), strict=True)):
        found = reading.logits(i, row.first, len(row.ids_T))
        torch.testing.assert_close(found, expected[row.first :], rtol=1e-4, atol=1e-4)
    with pytest.raises(IndexError):
        reading.logits(2, 29, 31)
    reading.close()


def test_numbers_equal_slow_arithmetic(build_model: Any) -> None:
    rows = sequences(24, 24, 24)
    folders = build_model(name="a"), build_model(name="b", num_hidden_layers=1)
    r, c = (torch.stack(whole_logits(f, rows)).double() for f in folders)
    readings = [TorchRunner.open(f).read(rows) for f in folders]
    scores = compare(readings[0], readings[1], windows_of(rows, min_context=5))
    nll_r, nll_c, kl, same, mse = [], [], [], [], []
    for w in range(3):
        for p in range(4, 23):
            pr, pc = r[w, p].softmax(-1), c[w, p].softmax(-1)
            target = int(rows[w].ids_T[p + 1])
            nll_r.append(-math.log(pr[target]))
            nll_c.append(-math.log(pc[target]))
            kl.append(float((pr * (pr.log() - pc.log())).sum()))
            same.append(bool(r[w, p].argmax() == c[w, p].argmax()))
            mse.append(float((r[w, p] - c[w, p]).square().mean()))
    np.testing.assert_allclose(scores.nll_reference_S, nll_r, rtol=1e-4)
    np.testing.assert_allclose(scores.nll_candidate_S, nll_c, rtol=1e-4)
    np.testing.assert_allclose(scores.kl_S, kl, rtol=2e-3, atol=1e-6)
    np.testing.assert_allclose(scores.mse_S, mse, rtol=1e-3)
    assert scores.same_top_S.tolist() == same
    value = {m.name: m for m in metrics(scores, num_bytes=100)}
    assert value["perplexity"].value == pytest.approx(math.exp(np.mean(nll_c)), rel=1e-4)
    assert value["perplexity"].reference == pytest.approx(math.exp(np.mean(nll_r)), rel=1e-4)
    assert value["bits_per_byte"].value == pytest.approx(sum(nll_c) / math.log(2) / 100, rel=1e-4)
    assert value["kl_99"].value == pytest.approx(np.quantile(kl, 0.99), rel=2e-3)
    delta = np.exp(-np.array(nll_c)) - np.exp(-np.array(nll_r))
    assert value["rms_delta_p"].value == pytest.approx(math.sqrt(np.mean(delta**2)), rel=1e-3)
    assert value["top1_agreement"].value == pytest.approx(np.mean(same))
    assert sum(kl_histogram(scores.kl_S).counts) == len(kl)  # type: ignore[union-attr]


def test_a_model_against_itself_is_zero(build_model: Any) -> None:
    rows = sequences(16, 16)
    folder = build_model()
    a, b = (TorchRunner.open(folder).read(rows, observe=2) for _ in range(2))
    scores = compare(a, b, windows_of(rows))
    assert not scores.kl_S.any() and not scores.mse_S.any() and scores.same_top_S.all()
    assert kl_histogram(scores.kl_S) is None
    assert a.observed is not None and b.observed is not None
    assert all(e.mse == 0 and e.snr_db is None for e in block_errors(a.observed, b.observed))


def test_interval_is_the_ratio_estimators(build_model: Any) -> None:
    """Against many bootstrap draws of whole windows."""
    rng = np.random.default_rng(0)
    window = np.repeat(np.arange(60), rng.integers(5, 40, 60))
    values = rng.normal(3, 1, len(window)) + rng.normal(0, 0.5, 60)[window]
    empty = np.zeros(len(window))
    scores = divergence.TokenScores(
        window_S=window, nll_reference_S=empty, nll_candidate_S=values, kl_S=empty, same_top_S=empty > 0, mse_S=empty
    )
    mean, low, high = mean_interval(scores, values)
    sums, counts = scores.by_window(values), scores.by_window(np.ones(len(window)))
    picks = rng.integers(0, 60, (4000, 60))
    draws = sums[picks].sum(1) / counts[picks].sum(1)
    assert mean == pytest.approx(values.mean())
    assert low is not None and high is not None
    assert high - low == pytest.approx(2 * 1.96 * draws.std(), rel=0.08)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_entropy_is_of_the_attention_weights(build_model: Any, implementation: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = build_model()
    rows = sequences(20, 20)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    seen: list[torch.Tensor] = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0].abs()))
    with torch.no_grad():
        out = model(torch.stack([r.ids_T for r in rows]), output_attentions=True)
    runner = TorchRunner.open(folder)
    runner.model.model.config._attn_implementation = implementation
    observed = runner.read(rows, observe=2).observed
    assert observed is not None
    for layer, weights in enumerate(out.attentions):
        expected = -torch.special.xlogy(weights, weights).sum(-1).mean((0, 2))
        torch.testing.assert_close(torch.tensor(observed.entropy[layer]), expected, rtol=1e-4, atol=1e-4)
    expected_quantiles = np.quantile(seen[0].numpy(), (0.01, 0.5, 1.0))
    np.testing.assert_allclose([observed.activations[1][i] for i in (0, 3, 8)], expected_quantiles, rtol=1e-4)
    assert len(block_internals(observed, observed)) == 2


def test_watching_is_bounded() -> None:
    assert watchable(32, 4096, [512] * 100) == 1
    assert watchable(6, 384, [512] * 100) == 4
    assert watchable(18, 640, [512] * 100, 536 << 20) == 2
    assert watchable(32, 4096, [512] * 100, 16 << 30) == 4
    assert watchable(6, 384, [512, 100]) == 1
    assert watchable(6, 384, []) == 0


def test_nan_names_the_block(build_model: Any) -> None:
    from safetensors.torch import load_file, save_file

    folder = build_model()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38)  # finite weights whose products overflow
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ArtifactError, match="model.layers.1 is the first block whose output is not finite"):
        TorchRunner.open(folder).read(sequences(16))


def test_windows_cover_every_token_once() -> None:
    ids = torch.arange(1000)
    for context, stride in ((100, 100), (100, 25), (64, 32)):
        first = max(1, context - stride)
        rows = cut(ids, body=context, step=stride, front=None, first=first - 1)
        scored = torch.cat([r.ids_T[first:] for r in rows])
        assert len(scored.unique()) == len(scored)
        if stride < context:
            assert scored.tolist() == list(range(first, first + len(scored)))


def test_windows_state_their_bos_and_refuse_double_scoring(reference_model: Path, calib_text: Path) -> None:
    tokenizer = tokens.load_tokenizer(reference_model)
    options: dict[str, Any] = {
        "context": 32, "stride": None, "min_context": None, "bos": "never", "max_tokens": 256,
        "model": reference_model, "vocab_size": 4096,
    }  # fmt: skip
    plain = load_windows(str(calib_text), tokenizer, **options)
    assert len(plain.sequences) == 8 and not plain.bos and plain.num_scored == 8 * 31
    decoded = "".join(tokenizer.decode(plain.targets(i)) for i in range(8))
    assert plain.num_bytes == len(decoded.encode())
    with_bos = load_windows(str(calib_text), tokenizer, **{**options, "bos": "always"})
    assert all(int(s.ids_T[0]) == tokenizer.bos_token_id and len(s.ids_T) == 32 for s in with_bos.sequences)
    assert with_bos.sequences[0].ids_T[1:].tolist() == plain.sequences[0].ids_T[:31].tolist()
    with pytest.raises(ConfigError, match="scored twice"):
        load_windows(str(calib_text), tokenizer, **{**options, "stride": 8, "min_context": 4})
    with pytest.raises(ConfigError, match="would be left out"):
        load_windows(str(calib_text), tokenizer, **{**options, "stride": 64})


@pytest.mark.slow
def test_known_perplexity_of_the_reference_model(reference_model: Path, shared_data: Path) -> None:
    """The model card's 20.186 on WikiText-2 raw test, context 512, first 200 windows, float32."""
    windows = load_windows(
        str(shared_data / "wikitext-2" / "wiki.test.raw"), tokens.load_tokenizer(reference_model), context=512,
        stride=None, min_context=None, bos="never", max_tokens=200 * 512, model=reference_model, vocab_size=4096,
    )  # fmt: skip
    reading = TorchRunner.open(reference_model).read(windows.sequences)
    scores = compare(reading, reading, windows)
    assert math.exp(scores.nll_candidate_S.mean()) == pytest.approx(20.186, abs=0.002)


def test_statistics_are_llama_cpps(reference_model: Path, tmp_path: Path) -> None:
    """Equal to the digits llama.cpp prints, with its definitions written out (tools/perplexity/perplexity.cpp).

    It scores the second half of each window and interpolates quantiles between the nearest two of n sorted values at
    fraction * (n - 1). It also stores the original in 16 bits, which is left out here, and drops the original's tokens
    below -16 nats, which moves the mean by less than a thousandth of it.
    """
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "noisy"
    shutil.copytree(reference_model, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, t in tensors.items():
        if t.ndim == 2:
            tensors[name] = t + (torch.randn(t.shape, generator=generator) * 0.05 * t.float().std()).to(t.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rows = sequences(512, 512)
    readings = [TorchRunner.open(f).read(rows) for f in (reference_model, folder)]
    found = {m.name: m.value for m in metrics(compare(*readings, windows_of(rows, min_context=257)), 1)}
    kld, cut_off, p_diff, same = [], [], [], 0
    for i, row in enumerate(rows):
        base, ours = (r.logits(i, 256, 511).double().log_softmax(-1).numpy() for r in readings)
        for position in range(255):
            b, q = base[position], ours[position]
            terms = np.exp(b) * (b - q)
            kld.append(float(terms.sum()))
            cut_off.append(float(terms[b > -16].sum()))
            target = int(row.ids_T[257 + position])
            p_diff.append(math.exp(q[target]) - math.exp(b[target]))
            same += int(b.argmax() == q.argmax())

    def percentile(fraction: float) -> float:
        values = sorted(kld)
        place = fraction * (len(values) - 1)
        low = int(place)
        return (1 - (place - low)) * values[low] + (place - low) * values[min(low + 1, len(values) - 1)]

    assert len(kld) == 2 * 255
    assert np.mean(cut_off) == pytest.approx(np.mean(kld), rel=1e-3)
    printed = {
        "kl_mean": (np.mean(kld), 6),
        "kl_max": (max(kld), 6),
        "kl_99.9": (percentile(0.999), 6),
        "kl_99": (percentile(0.99), 6),
        "kl_95": (percentile(0.95), 6),
        "kl_median": (percentile(0.5), 6),
        "rms_delta_p": (math.sqrt(np.mean(np.square(p_diff))), 5),
        "top1_agreement": (same / len(kld), 5),
    }
    for name, (expected, digits) in printed.items():
        assert found[name] == pytest.approx(expected, abs=2 * 10.0**-digits), name
