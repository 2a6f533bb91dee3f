"""The dialect of opset 24, for TensorRT from 10.15 on: one operator each for norm, rotation, cache and attention.

TensorRT's conditions (operator pages KVCacheUpdate and Attention): a cache is a network input of static length, its
update a network output at the same address; attention has no past, no soft cap, and not a mask and causality at once.
So the mask says both what is written and what is past, and a model with capped scores gets the decomposed attention.

Shapes: B batch, T tokens, S cache capacity, N heads (of queries, or of keys and values), K key-value heads, Q queries
that share a key-value head, D head size, F rotated pairs
"""

from __future__ import annotations

from exporters.trt.graph import opset21
from exporters.trt.graph.builder import Graph

OPSET = 24
IR_VERSION = 13

cap = opset21.cap


def rms_norm(g: Graph, x: str, weight: str, eps: float, name: str) -> str:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis; the operator computes in float32 (stash_type 1)."""
    return g.op("RMSNormalization", [x, weight], name, axis=-1, epsilon=eps, stash_type=1)


def rotate(
    g: Graph, x_BNTD: str, cos_SF: str, sin_SF: str, positions_BT: str, head_dim: int, dims: int, name: str
) -> str:
    """Rotary embedding: value i of a head turns with value i + F; values from `dims` on stay."""
    partial = {} if dims == head_dim else {"rotary_embedding_dim": dims}
    return g.op("RotaryEmbedding", [x_BNTD, cos_SF, sin_SF, positions_BT], name, interleaved=0, **partial)


def update_cache(
    g: Graph, past_BKSD: str, new_BKTD: str, positions_BT: str, write_indices_B: str, kv_heads: int, name: str
) -> str:
    """The cache with `new` from each sequence's write index on, in place on the device."""
    return g.op("TensorScatter", [past_BKSD, new_BKTD, write_indices_B], name, axis=2, mode="linear")


def attention(g: Graph, q_BKQD: str, k_BKSD: str, v_BKSD: str, mask_B1QS: str, softcap: float | None, name: str) -> str:
    """`softmax(q k^T + mask) v`, `[B, K, Q, D]`, of scaled queries."""
    if softcap is not None:
        return opset21.attention(g, q_BKQD, k_BKSD, v_BKSD, mask_B1QS, softcap, name)
    return g.op("Attention", [q_BKQD, k_BKSD, v_BKSD, mask_B1QS], name, scale=1.0, is_causal=0)
