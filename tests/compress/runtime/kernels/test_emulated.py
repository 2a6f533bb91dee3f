"""The decode kernels' own source on a CPU (`conftest.py`): products, attention, whole steps. On a GPU: tests/gpu."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from compress import doctor
from compress.activations import fake_quantize
from compress.plan import ActivationScheme
from compress.runtime.gpu_decoder import GpuDecoder, LayerWeights, Weights
from compress.runtime.kernels import decode, weight_only
from compress.runtime.kernels.decode import Heads
from compress.runtime.kernels.weight_only import Packed

pytestmark = pytest.mark.usefixtures("launches")


def make(n: int, k: int, bits: int, group: int) -> tuple[Packed, torch.Tensor]:
    """A packed weight and the float64 weight that it stands for."""
    if bits == 16:
        w = (torch.randn(n, k) * k**-0.5).half()
        return weight_only.pack_dense(w), w.double()
    groups = k // group if group > 0 else 1
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scale = ((torch.rand(n, groups) + 0.5) * k**-0.5 / 2 ** (bits - 1)).half()
    zero = torch.randint(2 ** (bits - 1) - 2, 2 ** (bits - 1) + 3, (n, groups))
    spread = k // groups
    w = (codes.double() - zero.repeat_interleave(spread, 1)) * scale.double().repeat_interleave(spread, 1)
    return weight_only.pack(codes, scale, zero, bits), w


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, -1), (16, -1)])
def test_products(bits: int, group: int) -> None:
    torch.manual_seed(0)
    packed, w = make(72, 192, bits, group)
    assert off(weight_only.dense(packed), w) < 4e-4
    bias = torch.randn(72).half()
    for m in (1, 11):
        x = torch.randn(m, 192).half()
        assert off(weight_only.matmul(x, packed, bias), x.double() @ w.t() + bias.double()) < 5e-4


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (2, 11)])
def test_a_norm_and_a_sum_inside_products(rows: int, tokens: int) -> None:
    """hidden += x W^T, then silu(gate) * value of its RMS norm, with no kernel between the two products."""
    torch.manual_seed(1)
    (down, w_down), (gate_up, w_gate_up) = make(144, 64, 4, 64), make(64, 144, 16, -1)
    x, hidden, weight = torch.randn(tokens, 64).half(), torch.randn(tokens, 144), torch.rand(144) + 0.5
    wanted = hidden.double() + x.double() @ w_down.t()
    normed = F.rms_norm(wanted, (144,), weight.double(), 1e-5)
    gate, value = (normed @ w_gate_up.t()).unflatten(-1, (-1, 2, 8)).unbind(-2)
    before, factor, squares = torch.rand(tokens) + 0.5, torch.zeros(tokens), torch.full((tokens, 9), torch.nan)
    between = torch.full((tokens, 144), torch.nan).half()
    tiles = 1 if tokens <= 8 else 2
    added = weight_only.Added(stream=hidden, weight=weight, before=before, squares=squares)
    weight_only.matmul(x, down, out=between, added=added, cut=weight_only.Tiling(1, tiles, 4, rows))
    assert off(hidden, wanted) < 1e-6 and off(squares.sum(1), wanted.square().sum(1)) < 1e-6
    read = weight_only.Normed(squares=squares, before=before, factor=factor, eps=1e-5)
    found = weight_only.matmul(between, gate_up, gated=True, normed=read, cut=weight_only.Tiling(1, tiles, 4, rows))
    assert off(found, (F.silu(gate) * value).flatten(-2)) < 2e-3
    assert off(factor, (wanted.square().mean(1) + 1e-5).rsqrt()) < 1e-6


def test_the_doctor_compiles_a_kernel_that_is_launched() -> None:
    """Every name in the source is set: its own list of them had fallen behind."""
    assert doctor._compile_kernel() == "compiles the decode kernels"


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_are_rounded_as_the_artifact_says(symmetric: bool) -> None:
    """To the bit but for values at the middle of two codes."""
    torch.manual_seed(3)
    x = torch.randn(5, 576).half() * torch.tensor([1, 1e-3, 40, 1, 1]).half()[:, None]
    x[3] = 0
    x[4, 1:] = 0
    scheme = ActivationScheme(symmetric=symmetric)
    wanted = fake_quantize(x, scheme)
    decode.round_rows(x, scheme)
    step = wanted.float().abs().amax(1, keepdim=True) / 127
    assert float((x != wanted).float().mean()) < 1e-3
    assert bool(((x.float() - wanted.float()).abs() <= 1.01 * step).all()) and not x[3].any()


def small(bits: int, size: int, query: int, key: int, norms: bool) -> Weights:
    hidden, intermediate, vocabulary = 64, 96, 200
    group = 32 if bits == 4 else -1

    def ones(n: int) -> torch.Tensor:
        return torch.rand(n) + 0.5

    layers = [
        LayerWeights(
            input_norm=ones(hidden),
            qkv=make((query + 2 * key) * size, hidden, bits, group)[0],
            qkv_bias=torch.randn((query + 2 * key) * size).half() * 0.1,
            q_norm=ones(size) if norms else None,
            k_norm=ones(size) if norms else None,
            o=make(hidden, query * size, bits, group)[0],
            o_bias=torch.randn(hidden).half() * 0.1,
            post_norm=ones(hidden),
            gate_up=make(2 * intermediate, hidden, bits, group)[0],
            down=make(hidden, intermediate, bits, group)[0],
        )
        for _ in range(2)
    ]
    angle = torch.outer(torch.arange(64), 10000.0 ** (-torch.arange(size // 2) / (size // 2)))
    embedding = torch.randn(vocabulary, hidden).half()
    heads = Heads(query=query, key=key, size=size, scale=size**-0.5)
    return Weights(
        embedding=embedding, layers=layers, norm=ones(hidden), head=weight_only.pack_dense(embedding),
        cosines=angle.cos(), sines=angle.sin(), heads=heads, eps=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("bits", "size", "query", "key", "norms"), [(4, 64, 4, 2, True), (16, 128, 3, 1, False)])
def test_steps_continue_what_a_prompt_began(
    launches: Counter[str], bits: int, size: int, query: int, key: int, norms: bool, batch: int
) -> None:
    """Token by token through the kernels over a boundary of chunks, or at once through torch's attention."""
    torch.manual_seed(4)
    weights = small(bits, size, query, key, norms)
    ids = torch.randint(0, 200, (batch, 34))
    whole, steps = (GpuDecoder(weights, capacity=64, batch=batch, graphs=False) for _ in range(2))
    steps.prefill(ids[:, :31])
    launches.clear()
    for t in range(31, 34):
        found = steps.step(ids[:, t]).float()
    assert sum(launches.values()) == 3 * (5 + 2 * (5 if batch == 1 else 9))
    wanted = whole.prefill(ids).float()
    assert off(found, wanted) < 3e-3
    assert steps.ids_B.tolist() == found.argmax(-1).tolist() and steps.position_B.tolist() == [34] * batch
