"""The decode kernels on a GPU against float64 and against torch's own attention, rotation and norms."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from compress.activations import fake_quantize
from compress.plan import ActivationScheme
from compress.runtime.gpu_decoder import GpuDecoder, LayerWeights, Weights
from compress.runtime.kernels import decode, weight_only
from compress.runtime.kernels.decode import Heads
from compress.runtime.kernels.weight_only import Packed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: the decode kernels were not tested"),
]


def make(n: int, k: int, bits: int, group: int) -> tuple[Packed, torch.Tensor]:
    """A packed weight and the float64 weight that it stands for."""
    if bits == 16:
        w = (torch.randn(n, k, device="cuda") * k**-0.5).half()
        return weight_only.pack_dense(w), w.double()
    groups = k // group if group > 0 else 1
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device="cuda")
    scale = ((torch.rand(n, groups, device="cuda") + 0.5) * k**-0.5 / 2 ** (bits - 1)).half()
    zero = torch.randint(0, 2**bits, (n, groups), device="cuda")
    spread = k // groups
    w = (codes.double() - zero.repeat_interleave(spread, 1)) * scale.double().repeat_interleave(spread, 1)
    return weight_only.pack(codes, scale, zero, bits), w


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 64), (4, 32), (8, 128), (8, 32), (8, -1), (16, -1)])
@pytest.mark.parametrize(("n", "k"), [(256, 4096), (1000, 576), (136, 1152), (40, 14336)])
def test_products(bits: int, group: int, n: int, k: int) -> None:
    if group > 0 and k % group:
        pytest.skip("the group does not divide the columns")
    packed, w = make(n, k, bits, group)
    assert float((weight_only.dense(packed).double() - w).norm() / w.norm()) < 4e-4  # rounded to float16 once
    bias = torch.randn(n, device="cuda").half()
    for m in (1, 2, 7, 8, 9, 16, 17, 31, 33, 64):
        x = torch.randn(m, k, device="cuda").half()
        want = x.double() @ w.t() + bias.double()
        got = weight_only.matmul(x, packed, bias).double()
        assert float((got - want).norm() / want.norm()) < 5e-4, m


@pytest.mark.parametrize(("run", "warps", "rows"), [*itertools.product((1, 2), (4, 16), (1, 2))])
def test_every_cut_gives_the_product(run: int, warps: int, rows: int) -> None:
    packed, w = make(200, 1024, 4, 128)
    x = torch.randn(3, 1024, device="cuda").half()
    got = weight_only.matmul(x, packed, cut=weight_only.Tiling(run, 1, warps, rows)).double()
    want = x.double() @ w.t()
    assert float((got - want).norm() / want.norm()) < 5e-4


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [8, 384, 576, 4096, 14336])
def test_rows_are_rounded_as_the_artifact_says(size: int, symmetric: bool) -> None:
    """To the bit but for values at the middle of two codes: torch multiplies by reciprocals of its own, rounded twice.

    Such values are many where the largest of a row is a multiple of 127 in its last bits, as one row's is here.
    """
    torch.manual_seed(0)
    x = torch.randn(5, size, device="cuda").half() * torch.tensor([1, 1e-3, 40, 1, 1], device="cuda").half()[:, None]
    x[0] = (x[0] * 32).round() / 32
    x[0, 0] = 127 / 16
    x[3] = 0
    x[4, 1:] = 0
    scheme = ActivationScheme(symmetric=symmetric)
    wanted = fake_quantize(x, scheme)
    of = x.double()
    low, high = of.amin(1, keepdim=True), of.amax(1, keepdim=True)
    step = (of.abs().amax(1, keepdim=True) / 127 if symmetric else (high - low) / 255).clamp(min=1e-12)
    at_middle = (of / step % 1 - 0.5).abs() < 1e-4
    decode.round_rows(x, scheme)
    assert float((x != wanted)[~at_middle].float().mean()) < 1e-3
    assert bool(((x.double() - wanted.double()).abs() <= 1.01 * step + 1e-3 * of.abs()).all()) and not x[3].any()


def test_gate_in_the_product() -> None:
    packed, w = make(64, 512, 8, 128)
    x = torch.randn(5, 512, device="cuda").half()
    gate, value = (x.double() @ w.t()).unflatten(-1, (-1, 2, 8)).unbind(-2)
    want = (F.silu(gate) * value).flatten(-2)
    got = weight_only.matmul(x, packed, gated=True).double()
    assert float((got - want).norm() / want.norm()) < 5e-4


def small(bits: int, size: int, query: int, key: int, norms: bool) -> Weights:
    hidden, intermediate, vocabulary = 256, 512, 1000
    group = 64 if bits == 4 else -1

    def ones(n: int) -> torch.Tensor:
        return torch.rand(n, device="cuda") + 0.5

    layers = [
        LayerWeights(
            input_norm=ones(hidden),
            qkv=make((query + 2 * key) * size, hidden, bits, group)[0],
            qkv_bias=torch.randn((query + 2 * key) * size, device="cuda").half() * 0.1,
            q_norm=ones(size) if norms else None,
            k_norm=ones(size) if norms else None,
            o=make(hidden, query * size, bits, group)[0],
            o_bias=None,
            post_norm=ones(hidden),
            gate_up=make(2 * intermediate, hidden, bits, group)[0],
            down=make(hidden, intermediate, bits, group)[0],
        )
        for _ in range(3)
    ]
    angle = torch.outer(torch.arange(512), 10000.0 ** (-torch.arange(size // 2) / (size // 2))).cuda()
    embedding = torch.randn(vocabulary, hidden, device="cuda").half()
    heads = Heads(query=query, key=key, size=size, scale=size**-0.5)
    head = weight_only.pack_dense(embedding)
    return Weights(
        embedding=embedding, layers=layers, norm=ones(hidden), head=head, cosines=angle.cos(), sines=angle.sin(),
        heads=heads, eps=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("bits", "size", "query", "key", "norms"), [(4, 64, 9, 3, False), (8, 128, 4, 1, True), (16, 256, 4, 2, False)]
)
def test_steps_continue_what_a_prompt_began(
    bits: int, size: int, query: int, key: int, norms: bool, batch: int
) -> None:
    """Token by token through the kernels, or at once through torch's attention: the same logits."""
    weights = small(bits, size, query, key, norms)
    ids = torch.randint(0, 1000, (batch, 200), device="cuda")
    whole = GpuDecoder(weights, capacity=256, batch=batch, graphs=False)
    steps = GpuDecoder(weights, capacity=256, batch=batch, graphs=True)
    steps.prefill(ids[:, :150])
    for t in range(150, 200):
        got = steps.step(ids[:, t]).float()
    want = whole.prefill(ids).float()
    assert float((got - want).norm() / want.norm()) < 5e-3
    assert steps.graph is not None and steps.graph.replays == 50
    assert steps.graph.launches == (5 + 3 * 5 if batch == 1 else 5 + 3 * 9)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("prompt", [3, 40, 130])
def test_graphs_change_no_id(prompt: int, batch: int) -> None:
    weights = small(4, 64, 8, 2, False)
    ids = torch.randint(0, 1000, (batch, prompt), device="cuda")
    seen = []
    for graphs in (False, True):
        decoder = GpuDecoder(weights, capacity=256, batch=batch, graphs=graphs)
        decoder.prefill(ids)
        seen.append(decoder.greedy(80))
    assert torch.equal(seen[0], seen[1])
    assert decoder.graph is not None and decoder.graph.replays == 80
