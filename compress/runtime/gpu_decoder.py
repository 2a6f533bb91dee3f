"""A decoder-only model on one GPU, at the speed of its memory: packed linears, a fixed cache, one CUDA graph a step.

For the plain pre-norm decoders (Llama, Mistral, Qwen 2 and 3, SmolLM and their like): RMS norms, rotary embedding,
grouped queries, a gated SiLU. Everything is read through `Weights`, so that a test or a benchmark can hand in its own.

Shapes: B sequences, T tokens, H hidden size, A query heads, C key heads, D size of a head, V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.activations import fake_quantize
from compress.plan import ActivationScheme
from compress.runtime.cuda_graph import CudaGraph
from compress.runtime.kernels import decode, weight_only
from compress.runtime.kernels.decode import Heads
from compress.runtime.kernels.weight_only import Packed

# The input quantizers that the kernels have.
BY_TOKEN = (ActivationScheme(), ActivationScheme(symmetric=False))


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerWeights:
    """One block. Norms are float32; qkv is stacked, gate_up interleaved (`weight_only`); biases float16 or None.

    rounded: of qkv, o, gate_up and down, how the inputs of those become INT8 that have such; one of `BY_TOKEN`.
    """

    input_norm: Tensor
    qkv: Packed
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Packed
    o_bias: Tensor | None
    post_norm: Tensor
    gate_up: Packed
    down: Packed
    rounded: Mapping[str, ActivationScheme] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """A model. embedding `[V, H]` float16; cosines, sines float32 `[positions, D / 2]`."""

    embedding: Tensor
    layers: list[LayerWeights]
    norm: Tensor
    head: Packed
    cosines: Tensor
    sines: Tensor
    heads: Heads
    eps: float

    def bytes_a_token(self) -> int:
        """What one step must read of the weights, whatever the batch: all linears and the output matrix."""
        linears = sum(w.num_bytes() for x in self.layers for w in (x.qkv, x.o, x.gate_up, x.down))
        return linears + self.head.num_bytes()


class GpuDecoder:
    """See `compress.runtime.runner.Decoder`. Sequences of a batch have prompts of one length."""

    runtime = "torch-cuda"

    def __init__(self, weights: Weights, *, capacity: int, batch: int = 1, graphs: bool = True) -> None:
        self.weights = weights
        self.capacity = capacity
        self.batch = batch
        self.graph: CudaGraph | None = None
        self.graphs = graphs
        heads, device = weights.heads, weights.embedding.device
        hidden, size = weights.embedding.shape[1], heads.size
        # Norms and sums belong to the products beside them, attention is one kernel: a step of one sequence is
        # 3 to 17 % shorter. Of several it was not measured: each block would sum the squares of all of them again.
        whole_tiles = hidden % weight_only.TILE_N == 0
        self.fused = batch == 1 and whole_tiles and not any(layer.rounded for layer in weights.layers)
        depth = len(weights.layers)

        def buffer(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.keys = buffer(depth, batch, heads.key, capacity, size)
        self.values = buffer(depth, batch, heads.key, capacity, size)
        self.ids_B = buffer(batch, dtype=torch.int64)
        self.best_B = buffer(batch, dtype=torch.int64)
        self.position_B = buffer(batch, dtype=torch.int32)
        self.hidden_BH = buffer(batch, hidden, dtype=torch.float32)
        self.normed_BH = buffer(batch, hidden)
        self.q = buffer(batch, heads.query, size)
        chunks = decode.num_chunks(batch, capacity, heads)
        self.partial = buffer(batch, heads.query, chunks, size + 2, dtype=torch.float32)
        self.attended = buffer(batch, heads.query * size)
        self.logits_BV = buffer(batch, weights.embedding.shape[0])
        if self.fused:
            self.squares = buffer(batch, hidden // 16, dtype=torch.float32)
            self.factors = buffer(2 * depth + 1, batch, dtype=torch.float32)
            self.arrived = buffer(batch, heads.query, dtype=torch.int32)

    # ---- one step ------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Logits after `ids_B` at `position_B`; the greedy next ids and positions take their place."""
        if self.fused:
            return self._fused_step()
        w = self.weights
        decode.embed(w.embedding, self.ids_B, self.hidden_BH)
        added = None
        for index, layer in enumerate(w.layers):
            added = self._block(layer, index, added)
        decode.add_norm(self.hidden_BH, added, w.norm, w.eps, self.normed_BH)
        weight_only.matmul(self.normed_BH, w.head, out=self.logits_BV)
        decode.advance_greedily(self.logits_BV, self.best_B, self.ids_B, self.position_B)

    def _fused_step(self) -> None:
        """The same in 5 kernels a block instead of 9: norm number n reads what the product before it left.

        A product that is added to the stream writes the next norm's input with the last factor that is known, the
        norm's before; the product after the norm puts right what the two factors differ by.
        """
        w, depth = self.weights, len(self.weights.layers)
        norms = [n for x in w.layers for n in (x.input_norm, x.post_norm)] + [w.norm]
        decode.embed(w.embedding, self.ids_B, self.hidden_BH)
        decode.add_norm(self.hidden_BH, None, norms[0], w.eps, self.normed_BH, self.factors[0])
        for index, layer in enumerate(w.layers):
            n = 2 * index
            qkv = weight_only.matmul(self.normed_BH, layer.qkv, layer.qkv_bias, normed=self._normed(n))
            decode.attend_at_once(
                qkv, self.keys[index], self.values[index], (w.cosines, w.sines), (layer.q_norm, layer.k_norm),
                self.position_B, self.partial, self.arrived, self.attended, w.heads, w.eps,
            )  # fmt: skip
            added = self._added(n + 1, norms[n + 1])
            weight_only.matmul(self.attended, layer.o, layer.o_bias, out=self.normed_BH, added=added)
            gated = weight_only.matmul(self.normed_BH, layer.gate_up, gated=True, normed=self._normed(n + 1))
            added = self._added(n + 2, norms[n + 2])
            weight_only.matmul(gated, layer.down, out=self.normed_BH, added=added)
        weight_only.matmul(self.normed_BH, w.head, out=self.logits_BV, normed=self._normed(2 * depth))
        decode.advance_greedily(self.logits_BV, self.best_B, self.ids_B, self.position_B)

    def _normed(self, n: int) -> weight_only.Normed | None:
        """What a product after norm n needs; the first norm is a kernel of its own."""
        if not n:
            return None
        before, factor = self.factors[n - 1], self.factors[n]
        return weight_only.Normed(squares=self.squares, before=before, factor=factor, eps=self.weights.eps)

    def _added(self, n: int, weight: Tensor) -> weight_only.Added:
        """What a product before norm n needs."""
        before = self.factors[n - 1]
        return weight_only.Added(stream=self.hidden_BH, weight=weight, before=before, squares=self.squares)

    def _block(self, layer: LayerWeights, index: int, added: Tensor | None) -> Tensor:
        w, heads = self.weights, self.weights.heads
        keys, values = self.keys[index], self.values[index]
        decode.add_norm(self.hidden_BH, added, layer.input_norm, w.eps, self.normed_BH)
        qkv = weight_only.matmul(_rounded(self.normed_BH, layer, "qkv"), layer.qkv, layer.qkv_bias)
        norms = (layer.q_norm, layer.k_norm)
        decode.rotate(qkv, self.q, keys, values, (w.cosines, w.sines), norms, self.position_B, heads, w.eps)
        decode.attend(self.q, keys, values, self.position_B, self.partial, self.attended, heads)
        out = weight_only.matmul(_rounded(self.attended, layer, "o"), layer.o, layer.o_bias)
        decode.add_norm(self.hidden_BH, out, layer.post_norm, w.eps, self.normed_BH)
        gated = weight_only.matmul(_rounded(self.normed_BH, layer, "gate_up"), layer.gate_up, gated=True)
        return weight_only.matmul(_rounded(gated, layer, "down"), layer.down)

    def step(self, ids_B: Tensor) -> Tensor:
        """Logits `[B, V]` (a buffer, overwritten by the next step) after one more token each."""
        self.ids_B.copy_(ids_B)
        self._run()
        return self.logits_BV

    def _run(self) -> None:
        if not self.graphs:
            self._step()
            return
        if self.graph is None:
            ids, position = self.ids_B.clone(), self.position_B.clone()

            def restore() -> None:
                self.ids_B.copy_(ids)
                self.position_B.copy_(position)

            self.graph = CudaGraph(self._step, restore=restore)
        self.graph.replay()

    def greedy(self, count: int) -> Tensor:
        """The next `count` ids `[B, count]` after what was prefilled, without a word from the host in between."""
        out = torch.empty(count, self.batch, dtype=torch.int64, device=self.ids_B.device)
        for i in range(count):
            out[i].copy_(self.ids_B)
            self._run()
        return out.t()

    def advance(self) -> Tensor:
        self._run()
        return self.ids_B

    @property
    def vocab_size(self) -> int:
        return len(self.weights.embedding)

    @property
    def bytes_a_token(self) -> int:
        return self.weights.bytes_a_token()

    # ---- the prompt ----------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, ids_BT: Tensor) -> Tensor:
        """Logits `[B, V]` after the prompts; the caches hold them, `ids_B` the greedy next ids."""
        w, heads = self.weights, self.weights.heads
        batch, length = ids_BT.shape
        hidden = w.embedding[ids_BT.to(w.embedding.device)].float()
        at = torch.arange(length, device=hidden.device)
        cosines, sines = w.cosines[at][None, None], w.sines[at][None, None]
        for index, layer in enumerate(w.layers):
            x = _norm(hidden, layer.input_norm, w.eps).half()
            q, k, v = _heads(_many(_rounded_all(x, layer, "qkv"), layer.qkv, layer.qkv_bias), heads)
            q = _turned(q if layer.q_norm is None else _norm(q, layer.q_norm, w.eps), cosines, sines)
            k = _turned(k if layer.k_norm is None else _norm(k, layer.k_norm, w.eps), cosines, sines)
            self.keys[index][:, :, :length] = k
            self.values[index][:, :, :length] = v
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=heads.scale, enable_gqa=True)
            out = _rounded_all(out.transpose(1, 2).reshape(batch, length, -1), layer, "o")
            hidden += _many(out, layer.o, layer.o_bias)
            x = _norm(hidden, layer.post_norm, w.eps).half()
            both = _many(_rounded_all(x, layer, "gate_up"), layer.gate_up).unflatten(-1, (-1, 2, 8))
            gated = (F.silu(both[..., 0, :].float()) * both[..., 1, :]).half().flatten(-2)
            hidden += _many(_rounded_all(gated, layer, "down"), layer.down)
        last = _norm(hidden[:, -1], w.norm, w.eps).half()
        self.logits_BV.copy_(_many(last[:, None], w.head)[:, 0])
        self.position_B.fill_(length)
        self.ids_B.copy_(self.logits_BV.argmax(-1))
        return self.logits_BV


def _rounded(x_BK: Tensor, layer: LayerWeights, part: str) -> Tensor:
    """What a product of a step reads: x, in place where its inputs are INT8."""
    if part in layer.rounded:
        decode.round_rows(x_BK, layer.rounded[part])
    return x_BK


def _rounded_all(x: Tensor, layer: LayerWeights, part: str) -> Tensor:
    """The same of a prompt, in torch."""
    return fake_quantize(x, layer.rounded[part]) if part in layer.rounded else x


def _many(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """A linear for any number of rows: the kernel for few, the decoded weight for many."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if len(rows) <= weight_only.MOST_ROWS:
        out = weight_only.matmul(rows, packed, bias)
    else:
        out = F.linear(rows, weight_only.dense(packed), bias)
    return out.reshape(*x.shape[:-1], packed.shape[0])


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.float()
    normed: Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return normed


def _heads(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    parts = qkv.split([heads.query * heads.size, heads.key * heads.size, heads.key * heads.size], -1)
    q, k, v = (p.reshape(*p.shape[:2], -1, heads.size).transpose(1, 2) for p in parts)
    return q, k, v


def _turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    low, high = x.float().chunk(2, -1)
    return torch.cat((low * cosines - high * sines, high * cosines + low * sines), -1).half()
