"""A folder as the GPU decoder takes it, with each kernel replaced by its definition in torch: what is read, joined,
rounded and proven needs no GPU. The kernels themselves: tests/gpu.

Shapes: B sequences, A query heads, C key heads, D size of a head, S capacity
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from compress.activations import fake_quantize
from compress.errors import ArtifactError, UnsupportedError
from compress.plan import ActivationScheme
from compress.quantize.auto_stage import AutoRequest
from compress.quantize.int8_stage import Int8Request, quantize_int8
from compress.quantize.menu import Menu
from compress.runtime import gpu_weights
from compress.runtime.gpu_decoder import GpuDecoder
from compress.runtime.kernels import decode, weight_only
from compress.runtime.kernels.weight_only import Packed
from compress.runtime.resident import TorchDecoder
from compress.search import Goal, search
from compress.workspace import resolve

TEXT = "the old house stood by the river and nobody had lived there for many years since the war " * 60


# ---- what each kernel computes, one line after the other -----------------------------------------------------


def pack(codes_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor, num_bits: int) -> Packed:
    spread = codes_NK.shape[1] // scale_NG.shape[1]
    steps = codes_NK.float() - zero_NG.float().repeat_interleave(spread, 1)
    return pack_dense(steps * scale_NG.float().repeat_interleave(spread, 1))


def pack_dense(w_NK: Tensor) -> Packed:
    shape = (w_NK.shape[0], w_NK.shape[1])
    return Packed(codes=w_NK.half(), scales=None, zeros=None, num_bits=16, group_size=0, shape=shape)


def matmul(
    x: Tensor,
    w: Packed,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
    out: Any = None,
    normed: weight_only.Normed | None = None,
    added: weight_only.Added | None = None,
) -> Tensor:
    y = F.linear(x.float(), w.codes.float(), None if bias is None else bias.float())
    if normed is not None:
        normed.factor.copy_(torch.rsqrt(normed.squares.sum(-1) / x.shape[-1] + normed.eps))
        y *= (normed.factor / normed.before)[:, None]
    if added is not None:
        added.stream.add_(y)
        added.squares.copy_(added.stream.square().unflatten(-1, (-1, 16)).sum(-1))
        y = added.stream * added.weight * added.before[:, None]
    if gated:
        both = y.unflatten(-1, (-1, 2, 8))
        y = (F.silu(both[..., 0, :]) * both[..., 1, :]).flatten(-2)
    return y.half() if out is None else out.copy_(y.half())


def add_norm(
    hidden: Tensor, added: Tensor | None, weight: Tensor, eps: float, out: Tensor, factor: Tensor | None = None
) -> None:
    hidden.add_(0 if added is None else added.float())
    one_over = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)
    out.copy_((hidden * one_over * weight).half())
    if factor is not None:
        factor.copy_(one_over[:, 0])


def rotate(
    qkv: Tensor, q: Tensor, keys: Tensor, values: Tensor, tables: Any, norms: Any, at: Tensor, heads: Any, eps: float
) -> None:
    parts = qkv.float().unflatten(-1, (-1, heads.size)).split([heads.query, heads.key, heads.key], 1)
    for b, position in enumerate(at.tolist()):
        cosines, sines = (t[position] for t in tables)
        turned = []
        for x, weight in zip(parts[:2], norms, strict=True):
            x = x[b] if weight is None else F.rms_norm(x[b], (heads.size,), weight, eps)
            low, high = x.chunk(2, -1)
            turned.append(torch.cat((low * cosines - high * sines, high * cosines + low * sines), -1))
        q[b], keys[b, :, position], values[b, :, position] = turned[0], turned[1], parts[2][b]


def attend(q: Tensor, keys: Tensor, values: Tensor, at: Tensor, partial: Tensor, out: Tensor, heads: Any) -> None:
    for b, position in enumerate(at.tolist()):
        k, v = (t[b, :, : position + 1].float().repeat_interleave(heads.query // heads.key, 0) for t in (keys, values))
        share = (torch.einsum("ad,asd->as", q[b].float(), k) * heads.scale).softmax(-1)
        out[b] = torch.einsum("as,asd->ad", share, v).flatten()


def attend_at_once(
    qkv: Tensor, keys: Tensor, values: Tensor, tables: Any, norms: Any, at: Tensor, partial: Tensor, arrived: Tensor,
    out: Tensor, heads: Any, eps: float,
) -> None:  # fmt: skip
    q = qkv.new_empty(len(qkv), heads.query, heads.size)
    rotate(qkv, q, keys, values, tables, norms, at, heads, eps)
    attend(q, keys, values, at, partial, out, heads)


def advance(logits: Tensor, best: Tensor, ids: Tensor, position: Tensor) -> None:
    ids.copy_(logits.argmax(-1))
    position.add_(1)


@pytest.fixture(autouse=True)
def definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in (
        ("pack", pack),
        ("pack_dense", pack_dense),
        ("matmul", matmul),
        ("dense", lambda w: w.codes),
    ):
        monkeypatch.setattr(weight_only, name, function)
    for name, function in (
        ("add_norm", add_norm), ("rotate", rotate), ("attend", attend),
        ("attend_at_once", attend_at_once), ("advance_greedily", advance),
        ("embed", lambda table, ids, hidden: hidden.copy_(table[ids])),
        ("round_rows", lambda x, scheme: x.copy_(fake_quantize(x, scheme))),
    ):  # fmt: skip
        monkeypatch.setattr(decode, name, function)


def quantized(model: Path, folder: Path, **changes: Any) -> Path:
    (folder / "text.txt").write_text(TEXT)
    options: dict[str, Any] = {"calib": str(folder / "text.txt"), "samples": 2, "seq_len": 64, "effort": "fast"}
    return quantize_int8(Int8Request(source=resolve(str(model)), out=folder / "int8", **options, **changes)).out


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, reference_model: Path) -> Path:
    """The reference model as W8A8, inputs by token."""
    return quantized(reference_model, tmp_path_factory.mktemp("int8"))


def opened(folder: Path, **options: Any) -> GpuDecoder:
    return gpu_weights.open_decoder(folder, capacity=32, device="cpu", graphs=False, **options)


@pytest.mark.parametrize(("rounded", "batch"), [(False, 1), (False, 2), (True, 2)])
def test_the_decoder_is_the_model(rounded: bool, batch: int, artifact: Path, reference_model: Path) -> None:
    """Prompt and steps; with INT8 inputs as far as two roundings are apart."""
    folder = artifact if rounded else reference_model
    decoder, wanted = opened(folder, batch=batch), TorchDecoder.open(folder, capacity=32, batch=batch)
    parts = ("qkv", "o", "gate_up", "down") if rounded else ()
    assert decoder.weights.layers[0].rounded == dict.fromkeys(parts, ActivationScheme(symmetric=False))
    prompt = torch.arange(14).reshape(2, 7)[:batch] * 211 % 4000
    found, want = decoder.prefill(prompt).float(), wanted.prefill(prompt)
    for _ in range(5):
        error = float((found - want).norm() / want.norm())
        assert error < (6e-2 if rounded else 3e-3)  # two roundings apart: 3.3e-2
        ids = want.argmax(-1)
        found, want = decoder.step(ids).float(), wanted.step(ids)


def test_rounding_that_is_left_out_or_doubled_is_seen(artifact: Path, monkeypatch: Any) -> None:
    """Inputs of another scale: refused, so that transformers' forward runs the folder instead."""
    monkeypatch.setattr(decode, "round_rows", lambda x, scheme: x.copy_(fake_quantize(x * 8, scheme)))
    with pytest.raises(UnsupportedError, match="the GPU decoder's logits differ .*; use --runtime torch"):
        opened(artifact)


def test_wrong_weights_are_seen(artifact: Path, monkeypatch: Any) -> None:
    right = weight_only.interleaved
    monkeypatch.setattr(weight_only, "interleaved", lambda gate, value: right(value, gate))
    with pytest.raises(ArtifactError, match="the GPU decoder's logits differ"):
        opened(artifact)


def test_an_output_matrix_in_integers_stays_in_integers(
    build_model: Any, calib_text: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """As `auto --lm-head` writes it: its codes are packed, not what they decode to, and the model is the same."""
    source = resolve(str(build_model("Llama", head_dim=64, intermediate_size=256)))
    menu = Menu(int4=(32,), int8=False, dense=False, lm_head=True)
    request = AutoRequest(source=source, out=tmp_path / "auto", calib=str(calib_text), samples=4, seq_len=64, menu=menu)
    folder = search(request, Goal(gate=None, most=10_000_000), None).out
    packed = []

    def noted(codes_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor, num_bits: int) -> Packed:
        packed.append((codes_NK.shape[0], num_bits))
        return pack(codes_NK, scale_NG, zero_NG, num_bits)

    monkeypatch.setattr(weight_only, "pack", noted)
    decoder, wanted = opened(folder), TorchDecoder.open(folder, capacity=32, batch=1)
    assert packed[-1] == (decoder.vocab_size, 4)
    prompt = torch.arange(7)[None] * 211 % 4000
    found, want = decoder.prefill(prompt).float(), wanted.prefill(prompt)
    assert float((found - want).norm() / want.norm()) < 3e-3


def test_input_quantizers_that_the_kernels_lack(build_model: Any, tmp_path: Path) -> None:
    folder = quantized(build_model("Llama", head_dim=64), tmp_path, static=True)
    with pytest.raises(UnsupportedError, match="are a8-static, and the kernels have a8 and a8-asym only"):
        opened(folder)
