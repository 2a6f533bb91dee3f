"""Tuning on a GPU: its Triton kernels beside the same arithmetic in torch, a graph of updates beside updates."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from compress import numerics
from compress.quantize import captured_update, tune
from compress.quantize.feedback import Rounded
from compress.quantize.tune import Tuned, TuneOptions
from compress.scheme import Scheme

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: the Triton kernels were not tested"),
]


def rounded(num_rows: int, num_groups: int, scheme: Scheme) -> Rounded:
    generator = torch.Generator().manual_seed(num_rows)
    wide, narrow = (num_rows, num_groups * scheme.group_size), (num_rows, num_groups)
    scale = torch.rand(narrow, generator=generator) * 0.01 + 0.001
    zero = torch.randint(0, 16, narrow, generator=generator).float()
    codes = torch.randint(0, 16, wide, dtype=torch.uint8, generator=generator)
    near = codes + 0.7 * torch.randn(wide, generator=generator)
    of_column = [x.repeat_interleave(scheme.group_size, dim=1) for x in (scale, zero)]
    values = (codes, scale, zero, torch.ones(narrow), (near - of_column[1]) * of_column[0])
    names = ("codes_OI", "scale_OG", "zero_point_OG", "factor_OG", "wanted_OI")
    return Rounded(**{name: value.cuda() for name, value in zip(names, values, strict=True)})


@pytest.mark.parametrize("size", [16, 64, 96, 128])
@pytest.mark.parametrize(("num_rows", "num_groups"), [(1, 1), (33, 5), (1000, 9)])
def test_weights_and_updates_are_those_of_torch(num_rows: int, num_groups: int, size: int) -> None:
    """Weights bit for bit; a group's gradient along its weights is summed in another order, so its sign may differ
    where it is nearly zero."""
    scheme = Scheme(group_size=size)
    old = rounded(num_rows, num_groups, scheme)
    ours, torchs = tune._Layer(old, scheme), tune._Layer(old, scheme)
    assert ours.kernel
    torchs.kernel = False
    generator = torch.Generator().manual_seed(1)
    for step in range(12):
        made = [layer.weight().requires_grad_() for layer in (ours, torchs)]
        assert torch.equal(*made)
        gradient = torch.randn(made[0].shape, generator=generator)
        gradient[torch.rand(gradient.shape, generator=generator) < 0.1] = 0
        for layer, weight in zip((ours, torchs), made, strict=True):
            weight.grad = gradient.cuda()
            layer.step(weight, torch.tensor(0.05 * (1 - step / 12), device="cuda"))
        assert torch.equal(ours.offset_OGg, torchs.offset_OGg)
        assert float((ours.log_OG1 == torchs.log_OG1).float().mean()) > 0.999
        ours.log_OG1.copy_(torchs.log_OG1)
    codes = ours.rounded(old).codes_OI
    assert torch.equal(codes, torchs.rounded(old).codes_OI)
    assert num_rows < 1000 or 0 < float((codes != old.codes_OI).float().mean()) < 0.5


def block(hidden: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        h = torch.nn.functional.rms_norm(hidden, hidden.shape[-1:]) * parameters["norm"]
        return hidden + torch.nn.functional.silu(h @ parameters["up"].t()) @ parameters["down"].t()


@pytest.fixture
def tuned_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], tuple[Tuned, int]]:
    """The same problem tuned, with graphs of at most so many learned numbers; and how often one was replayed."""
    runs: list[captured_update.Repeated] = []

    class Watched(captured_update.Repeated):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            runs.append(self)

    def run(most: int, steps: int = 40) -> tuple[Tuned, int]:
        monkeypatch.setattr(tune, "Repeated", Watched)
        monkeypatch.setattr(tune, "MOST", most)
        scheme = Scheme(group_size=64)
        layers = {"up": rounded(384, 2, scheme), "down": rounded(128, 6, scheme)}
        norm = torch.rand(128, generator=torch.Generator().manual_seed(2)).cuda() + 0.5
        x = torch.randn(48, 32, 128, generator=torch.Generator().manual_seed(3)).cuda()
        wanted = {name: r.wanted_OI.clone() for name, r in layers.items() if r.wanted_OI is not None}
        with torch.no_grad(), numerics.repeatable(x.device):
            y = block(x, {**wanted, "norm": norm})
            tuned = tune.tune_block(layers, {"norm": norm}, block, x, y, scheme, TuneOptions(steps=steps, rows=4))
        return tuned, runs.pop().replays

    return run


def test_a_graph_tunes_as_its_updates_do(tuned_with: Callable[[int], tuple[Tuned, int]]) -> None:
    (one, replays), (again, _), (alone, none) = tuned_with(1 << 26), tuned_with(1 << 26), tuned_with(0)
    assert (replays, none) == (40 - captured_update.EAGER, 0)
    assert one.kept and one.said == alone.said == []
    assert one.errors == again.errors and one.errors[0] == alone.errors[0]
    assert one.errors[1] == pytest.approx(alone.errors[1], rel=1e-2) and one.errors[1] < 0.95 * one.errors[0]
    for name, layer in one.layers.items():
        assert torch.equal(layer.codes_OI, again.layers[name].codes_OI)
        assert float((layer.codes_OI != alone.layers[name].codes_OI).float().mean()) < 0.01
        torch.testing.assert_close(layer.scale_OG, alone.layers[name].scale_OG, rtol=1e-2, atol=0)
    torch.testing.assert_close(one.norms["norm"], alone.norms["norm"], rtol=1e-2, atol=0)
