"""The decoder as an ONNX graph: prefill and decode are the same graph, called with T tokens and a cache of fixed
capacity.

Inputs   input_ids int64 [B, T]; write_indices int64 [B], how many tokens each sequence's cache holds already;
         logits_indices int64 [B, L], which of the T tokens to predict after; past_key_values.N.key|value [B, K, S, D]
Outputs  logits [B, L, V]; present.N.key|value [B, K, S, D], the caches with T more tokens

A token at position p sees the slots up to p, so what lies beyond in the cache does not matter: a shorter sequence of a
batch may be padded on the right, and its padding is overwritten as it decodes on.

Shapes: B batch, T new tokens, L logits asked for, S cache capacity, N query heads, K key-value heads, R = N / K, D head
size, H hidden size, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import onnx
from onnx import helper

from compress.errors import UnsupportedError
from exporters.trt.graph import opset21, opset24, rope
from exporters.trt.graph.architecture import Architecture, Layer
from exporters.trt.graph.builder import Graph
from exporters.trt.graph.weights import Weights, array

DIALECTS: dict[int, ModuleType] = {24: opset24, 21: opset21}
INT64 = onnx.TensorProto.INT64

# What linears of one input are called together: as Phi-3 calls its own.
QKV, GATE_UP = "qkv_proj", "gate_up_proj"
LINEARS = "decoder linears"
EMBEDDING = "embedding"
HEAD = "lm_head"


class Decoder:
    """Writes one architecture in one dialect; see `build`."""

    def __init__(self, arch: Architecture, weights: Weights, dialect: ModuleType, capacity: int) -> None:
        self.arch = arch
        self.weights = weights
        self.dialect = dialect
        self.capacity = capacity
        self.g = Graph(weights.float_type)

    # ---- what every layer shares -----------------------------------------------------------------

    def sizes(self) -> None:
        """Batch and token counts, as vectors of one and a scalar, and each new token's position `[B, T]`."""
        g = self.g
        g.op("Shape", ["input_ids"], "sizes/batch", start=0, end=1)
        g.op("Shape", ["input_ids"], "sizes/tokens", start=1, end=2)
        g.op("Squeeze", ["sizes/batch", g.ints([0])], "sizes/batch_scalar")
        g.op("Squeeze", ["sizes/tokens", g.ints([0])], "sizes/tokens_scalar")
        steps = g.op("Range", [g.ints(0), "sizes/tokens_scalar", g.ints(1)], "positions/steps")
        start = g.op("Unsqueeze", ["write_indices", g.ints([1])], "positions/start")
        g.op("Add", [start, steps], "positions")

    def mask(self, window: int | None) -> str:
        """Bool `[B, 1, R T, S]`: slot s is seen from position p when `p - window < s <= p`."""
        g, sharing = self.g, self.arch.num_heads // self.arch.num_kv_heads
        slots = g.weight(array("slots", np.arange(self.capacity, dtype=np.int64).reshape(1, 1, 1, -1)))
        folded = g.op("Tile", ["positions", g.ints([1, sharing])], "mask/positions") if sharing > 1 else "positions"
        query = g.op("Unsqueeze", [folded, g.ints([1, 3])], "mask/queries")
        causal = g.op("LessOrEqual", [slots, query], "mask/causal")
        if window is None or window >= self.capacity:
            return causal
        first = g.op("Sub", [query, g.ints([window])], f"mask/before_{window}")
        near = g.op("Greater", [slots, first], f"mask/near_{window}")
        return g.op("And", [causal, near], f"mask/window_{window}")

    def norm(self, x: str, module: str) -> str:
        weight = self.g.weight(self.weights.vector(f"{module}.weight", offset=self.arch.family.norm_offset))
        name: str = self.dialect.rms_norm(self.g, x, weight, self.arch.norm_eps, module)
        return name

    def linear(self, x: str, layer: str, part: str = LINEARS) -> str:
        """`x W (+ bias)`; a quantized W, and an x with a range, are codes in the graph that it dequantizes."""
        return self._product(x, [layer], layer, part)

    def siblings(self, x: str, layers: Sequence[str], name: str) -> list[str]:
        """Linears of one input: one product as wide as all of them, which a decode step reads at a better rate, and
        its pieces. Where they cannot be one (`Weights.joins`), a product each."""
        if not self.weights.joins(layers):
            return [self.linear(x, layer) for layer in layers]
        widths = [self.weights.size(f"{layer}.weight")[0] for layer in layers]
        return self.g.split(self._product(x, layers, name, LINEARS), widths, list(layers))

    def _product(self, x: str, layers: Sequence[str], name: str, part: str) -> str:
        g, w = self.g, self.weights
        has_bias = w.has(f"{layers[0]}.bias")
        product = f"{name}/product" if has_bias else name
        scheme = w.scheme(layers[0])
        if scheme is not None and scheme.weight is not None and scheme.weight.num_bits == 8:
            step = w.input_scale(layers[0])
            x = x if step is None else self._rounded(x, step)
            pair = w.int8_KN(layers, name, part)
            matrix = g.op("DequantizeLinear", [g.weight(t) for t in pair], f"{name}/dequantized", axis=1)
        elif scheme is not None:
            codes, scales, block_size = w.int4_KN(layers, name, part)
            inputs = [g.weight(codes), g.weight(scales)]
            matrix = g.op("DequantizeLinear", inputs, f"{name}/dequantized", axis=0, block_size=block_size)
        else:
            matrix = g.weight(w.dense_KN(layers, name, part))
        out = g.op("MatMul", [x, matrix], product)
        return g.op("Add", [out, g.weight(w.biases(layers, name))], name) if has_bias else out

    def _rounded(self, x: str, step: float) -> str:
        """x as INT8 codes with one step, and back: what TensorRT computes an INT8 product from."""
        g = self.g
        pair = [g.scalar(step), g.scalar(0, onnx.TensorProto.INT8)]
        codes = g.op("QuantizeLinear", [x, *pair], f"{x}/codes_{step!r}")
        return g.op("DequantizeLinear", [codes, *pair], f"{x}/rounded_{step!r}")

    # ---- one layer -------------------------------------------------------------------------------

    def attention(self, x: str, index: int, layer: Layer) -> str:
        g, arch, module = self.g, self.arch, f"model.layers.{index}.self_attn"
        widths = [heads * arch.head_dim for heads in (arch.num_heads, arch.num_kv_heads, arch.num_kv_heads)]
        if arch.family.fused:
            parts = g.split(self.linear(x, f"{module}.{QKV}"), widths, [f"{module}/{c}" for c in "qkv"])
        else:
            parts = self.siblings(x, [f"{module}.{c}_proj" for c in "qkv"], f"{module}.{QKV}")
        q, k, v = (self._heads(part, f"{module}/{c}") for part, c in zip(parts, "qkv", strict=True))
        q, k, v = (
            g.op("Transpose", [x], f"{module}/{c}_by_head", perm=[0, 2, 1, 3])
            for x, c in (
                (self.norm(q, f"{module}.q_norm") if arch.family.qk_norm else q, "q"),
                (self.norm(k, f"{module}.k_norm") if arch.family.qk_norm else k, "k"),
                (v, "v"),
            )
        )
        cos, sin = self._rope(layer)
        q, k = (
            self.dialect.rotate(g, x, cos, sin, "positions", arch.head_dim, layer.rope.dims, f"{module}/{c}_turned")
            for x, c in ((q, "q"), (k, "k"))
        )
        q = g.op("Mul", [q, g.scalar(arch.attention_scale)], f"{module}/q_scaled")
        keys, values = (
            self.dialect.update_cache(
                g, f"past_key_values.{index}.{c}", new, "positions", "write_indices", arch.num_kv_heads,
                f"present.{index}.{c}",
            )
            for c, new in (("key", k), ("value", v))
        )  # fmt: skip
        # The R query heads of one key-value head become R T queries of it (their memory is in that order already), so
        # that no reader needs to repeat keys and values.
        q = g.op("Reshape", [q, g.ints([0, arch.num_kv_heads, -1, arch.head_dim])], f"{module}/q_folded")
        mask = self.mask(layer.window)
        out = self.dialect.attention(g, q, keys, values, mask, arch.attention_softcap, f"{module}/mixed")
        out = g.op("Reshape", [out, g.ints([0, arch.num_heads, -1, arch.head_dim])], f"{module}/mixed_by_head")
        out = g.op("Transpose", [out], f"{module}/mixed_by_token", perm=[0, 2, 1, 3])
        out = g.op("Reshape", [out, g.ints([0, 0, widths[0]])], f"{module}/mixed_flat")
        return self.linear(out, f"{module}.o_proj")

    def _heads(self, x: str, name: str) -> str:
        return self.g.op("Reshape", [x, self.g.ints([0, 0, -1, self.arch.head_dim])], f"{name}_heads")

    def _rope(self, layer: Layer) -> tuple[str, str]:
        g, which = self.g, f"rope/{sorted({str(entry.rope) for entry in self.arch.layers}).index(str(layer.rope))}"
        dtype = helper.tensor_dtype_to_np_dtype(g.float_type)
        cos, sin = (
            g.weight(array(f"{which}/{label}", table.astype(dtype)))
            for label, table in zip(("cos", "sin"), rope.tables(layer.rope, self.capacity), strict=True)
        )
        return cos, sin

    def mlp(self, x: str, module: str) -> str:
        g, arch = self.g, self.arch
        if arch.family.fused:
            both = self.linear(x, f"{module}.{GATE_UP}")
            gate, up = g.split(both, [arch.intermediate_size] * 2, [f"{module}/gate", f"{module}/up"])
        else:
            gate, up = self.siblings(x, [f"{module}.gate_proj", f"{module}.up_proj"], f"{module}.{GATE_UP}")
        active = self._activation(gate, f"{module}/active")
        return self.linear(g.op("Mul", [active, up], f"{module}/gated"), f"{module}.down_proj")

    def _activation(self, x: str, name: str) -> str:
        g = self.g
        if self.arch.activation == "silu":
            return g.op("Mul", [x, g.op("Sigmoid", [x], f"{name}/sigmoid")], name)
        kind = "tanh" if self.arch.activation == "gelu_tanh" else "none"
        return g.op("Gelu", [x], name, approximate=kind)

    def layer(self, x: str, index: int) -> str:
        g, module = self.g, f"model.layers.{index}"
        attended = self.attention(self.norm(x, f"{module}.input_layernorm"), index, self.arch.layers[index])
        before_mlp = "post_attention_layernorm"
        if self.arch.family.post_norms:
            attended = self.norm(attended, f"{module}.post_attention_layernorm")
            before_mlp = "pre_feedforward_layernorm"
        x = g.op("Add", [x, attended], f"{module}/after_attention")
        out = self.mlp(self.norm(x, f"{module}.{before_mlp}"), f"{module}.mlp")
        if self.arch.family.post_norms:
            out = self.norm(out, f"{module}.post_feedforward_layernorm")
        return g.op("Add", [x, out], f"{module}/after_mlp")

    # ---- the whole -------------------------------------------------------------------------------

    def embed(self) -> str:
        g = self.g
        table = g.weight(self.weights.rows("model.embed_tokens.weight", EMBEDDING))
        x = g.op("Gather", [table, "input_ids"], "model.embed_tokens", axis=0)
        if not self.arch.family.scaled_embedding:
            return x
        return g.op("Mul", [x, g.scalar(self.arch.hidden_size**0.5)], "model.embed_tokens/scaled")

    def head(self, x: str) -> None:
        """Final norm and logits of the tokens asked for; the others are never multiplied with the vocabulary."""
        g, arch = self.g, self.arch
        rows = g.op("Range", [g.ints(0), "sizes/batch_scalar", g.ints(1)], "logits/batch")
        first = g.op("Mul", [rows, "sizes/tokens_scalar"], "logits/first")
        flat = g.op(
            "Add", ["logits_indices", g.op("Unsqueeze", [first, g.ints([1])], "logits/first_column")], "logits/rows"
        )
        flat = g.op("Reshape", [flat, g.ints([-1])], "logits/rows_flat")
        x = g.op("Reshape", [x, g.ints([-1, arch.hidden_size])], "logits/tokens_flat")
        x = self.norm(g.op("Gather", [x, flat], "logits/hidden", axis=0), "model.norm")
        out = self._product_with_vocabulary(x)
        if arch.logit_softcap is not None:
            out = self.dialect.cap(g, out, arch.logit_softcap, "lm_head/capped")
        asked = g.op("Shape", ["logits_indices"], "logits/asked")
        shape = g.op("Concat", [asked, g.ints([arch.vocab_size])], "logits/shape", axis=0)
        g.op("Reshape", [out, shape], "logits")

    def _product_with_vocabulary(self, x: str) -> str:
        """Gemm takes a matrix `[V, H]` as it is, so that a tied one is stored once."""
        w = self.weights
        if not self.arch.tied and w.is_quantized("lm_head"):
            return self.linear(x, "lm_head", HEAD)
        name = "model.embed_tokens.weight" if self.arch.tied else "lm_head.weight"
        w.source("lm_head.weight")
        return self.g.op("Gemm", [x, self.g.weight(w.rows(name, HEAD))], "lm_head", transB=1)


def build(arch: Architecture, weights: Weights, *, opset: int, capacity: int) -> tuple[Graph, onnx.ModelProto]:
    """The graph with its weights still to be written, and the model without them.

    UnsupportedError when the model has parameters that the graph does not use.
    """
    dialect = DIALECTS[opset]
    d = Decoder(arch, weights, dialect, capacity)
    d.sizes()
    x = d.embed()
    for index in range(len(arch.layers)):
        x = d.layer(x, index)
    d.head(x)
    if left := weights.unused():
        raise UnsupportedError(
            f"{weights.checkpoint.path}: {arch.model_type} with {left[0]} is not supported by onnx-trt yet "
            f"({len(left)} parameters would be left out)"
        )
    inputs, outputs = interface(arch, weights.float_type, capacity)
    graph = helper.make_graph(list(d.g.nodes.values()), arch.model_type, inputs, outputs, list(d.g.inline.values()))
    model = helper.make_model(
        graph,
        producer_name="compress-toolkit",
        ir_version=dialect.IR_VERSION,
        opset_imports=[helper.make_opsetid("", dialect.OPSET)],
    )
    return d.g, model


def interface(
    arch: Architecture, float_type: int, capacity: int
) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    """The graph's inputs and outputs, as at the head of this file."""
    value = helper.make_tensor_value_info
    cache = ["batch", arch.num_kv_heads, capacity, arch.head_dim]
    inputs = [
        value("input_ids", INT64, ["batch", "tokens"]),
        value("write_indices", INT64, ["batch"]),
        value("logits_indices", INT64, ["batch", "num_logits"]),
    ]
    outputs = [value("logits", float_type, ["batch", "num_logits", arch.vocab_size])]
    for index in range(len(arch.layers)):
        for kind in ("key", "value"):
            inputs.append(value(f"past_key_values.{index}.{kind}", float_type, cache))
            outputs.append(value(f"present.{index}.{kind}", float_type, cache))
    return inputs, outputs
