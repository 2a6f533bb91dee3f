"""Learned rounding: its gradients against autograd through a fake-quantizer, and its promise on held-out rows."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from compress.quantize import captured_update, tune
from compress.quantize.feedback import prepare, round_with_feedback
from compress.quantize.tune import TuneOptions, _Layer, tune_block
from compress.scheme import Scheme

SCHEME = Scheme(group_size=16)


def block(hidden: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """A gated block: two weights, a norm's gain, and the residual."""
    h = torch.nn.functional.rms_norm(hidden, (32,)) * parameters["norm"]
    return hidden + torch.tanh(h @ parameters["up"].t()) @ parameters["down"].t()


def inputs(rows: int, seed: int) -> Tensor:
    mixing = torch.randn(32, 32, generator=torch.Generator().manual_seed(5)) / 4 + torch.eye(32)
    return torch.randn(rows, 12, 32, generator=torch.Generator().manual_seed(seed)) @ mixing


def problem(rows: int = 96) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {
        "up": torch.randn(48, 32, generator=generator) * 0.3,
        "down": torch.randn(32, 48, generator=generator) * 0.3,
        "norm": torch.rand(32, generator=generator) + 0.5,
    }
    x = inputs(rows, seed=1)
    return weights, x, block(x, weights)


def rounded(weights: dict[str, Tensor]) -> dict[str, object]:
    return {
        n: round_with_feedback(weights[n], prepare(torch.eye(weights[n].shape[1]), SCHEME), SCHEME)
        for n in ("up", "down")
    }


def test_lowers_the_error_on_rows_it_never_saw_and_on_fresh_ones() -> None:
    weights, x, y = problem()
    layers = rounded(weights)
    tuned = tune_block(layers, {"norm": weights["norm"]}, block, x, y, SCHEME, TuneOptions(steps=150, rows=8))
    assert tuned.kept and tuned.errors[1] < 0.95 * tuned.errors[0]
    fresh = inputs(50, seed=9)

    def error(parameters: dict[str, Tensor]) -> float:
        return float((block(fresh, parameters) - block(fresh, weights)).square().mean())

    after = {n: r.dequantize(SCHEME) for n, r in tuned.layers.items()} | tuned.norms
    before = {n: r.dequantize(SCHEME) for n, r in layers.items()} | {"norm": weights["norm"]}
    assert error(after) < error(before)
    for name, r in tuned.layers.items():
        assert int((r.codes_OI.int() - layers[name].codes_OI.int()).abs().max()) <= 1  # half a step at most
        assert torch.equal(r.zero_point_OG, layers[name].zero_point_OG)
        assert torch.equal(r.scale_OG, r.scale_OG.half().float())


def test_what_does_not_help_is_not_kept() -> None:
    """A target that no rounding can come nearer to on held-out rows: noise."""
    weights, x, _ = problem(rows=20)
    y = block(x, weights)
    y[:-1] += torch.randn(y[:-1].shape, generator=torch.Generator().manual_seed(3)) * 30
    layers = rounded(weights)
    tuned = tune_block(layers, {"norm": weights["norm"]}, block, x, y, SCHEME, TuneOptions(steps=60))
    assert not tuned.kept
    assert all(tuned.layers[n] is layers[n] for n in layers) and torch.equal(tuned.norms["norm"], weights["norm"])


def test_same_seed_same_codes_other_seed_other_order() -> None:
    weights, x, y = problem(rows=20)
    runs = [
        tune_block(rounded(weights), {"norm": weights["norm"]}, block, x, y, SCHEME, TuneOptions(steps=30, seed=s))
        for s in (0, 0, 1)
    ]
    first, again, other = (torch.cat([r.codes_OI.flatten() for r in run.layers.values()]) for run in runs)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a graph can be made where there is a CUDA DEVICE")
def test_where_no_graph_can_be_made_it_is_said_and_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tried(captured_update.Repeated):
        def __call__(self) -> None:
            if self.calls != captured_update.EAGER:
                super().__call__()
                return
            self._first_captured()
            self.calls += 1

    weights, x, y = problem(rows=20)
    options = TuneOptions(steps=12)
    plain = tune_block(rounded(weights), {"norm": weights["norm"]}, block, x, y, SCHEME, options)
    monkeypatch.setattr(tune, "Repeated", Tried)
    tried = tune_block(rounded(weights), {"norm": weights["norm"]}, block, x, y, SCHEME, options)
    assert plain.said == [] and plain.errors == tried.errors
    assert all(torch.equal(tried.layers[n].codes_OI, r.codes_OI) for n, r in plain.layers.items())
    (said,) = tried.said
    assert said.startswith("updating without a CUDA graph, which takes longer: ")


def test_one_row_cannot_be_tuned_and_held_out() -> None:
    weights, x, y = problem(rows=1)
    tuned = tune_block(rounded(weights), {"norm": weights["norm"]}, block, x, y, SCHEME, TuneOptions(steps=5))
    assert not tuned.kept and tuned.errors[0] == tuned.errors[1]


def test_a_step_follows_the_gradients_of_autograd() -> None:
    """Signs of the hand-made gradients equal those of `(clamp(ste(start + v)) - z) * s * exp(t)` differentiated."""
    weights, x, y = problem(rows=4)
    layer = _Layer(rounded(weights)["up"], SCHEME)
    v = torch.zeros_like(layer.start_OGg, requires_grad=True)
    t = torch.zeros_like(layer.log_OG1, requires_grad=True)
    wanted = layer.start_OGg + v
    steps = wanted + (wanted.round().clamp(0, 15) - wanted).detach()
    (
        block(x, weights | {"up": ((steps - layer.zero_OG1) * layer.scale_OG1 * t.exp()).flatten(1)}) - y
    ).square().mean().backward()
    leaf = layer.weight().requires_grad_()
    (block(x, weights | {"up": leaf}) - y).square().mean().backward()
    layer.step(leaf, 0.01)
    assert v.grad is not None and t.grad is not None
    torch.testing.assert_close(layer.offset_OGg, -0.01 * v.grad.sign())
    torch.testing.assert_close(layer.log_OG1, -0.01 * t.grad.sign())
