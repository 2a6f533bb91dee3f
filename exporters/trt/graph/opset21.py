"""The decomposed dialect: basic operators only, for TensorRT 10.3 (JetPack 6.2) and what lacks the operators of opset
24.

Norms run in float32, because a float16 square overflows above 256. Attention is MatMul, Softmax, MatMul with the scale
already in the queries, which is the pattern that TensorRT's documentation names for fusion.

Shapes: B batch, T tokens, S cache capacity, N heads (of queries, or of keys and values), K key-value heads, Q queries
that share a key-value head, D head size, F rotated pairs
"""

from __future__ import annotations

import onnx

from exporters.trt.graph.builder import Graph

OPSET = 21
IR_VERSION = 10
FLOAT = onnx.TensorProto.FLOAT
LOWEST = -65504.0  # of float16: far below any score, and no infinity


def rms_norm(g: Graph, x: str, weight: str, eps: float, name: str) -> str:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis."""
    wide = g.float_type == FLOAT
    x32 = x if wide else g.op("Cast", [x], f"{name}/float", to=FLOAT)
    squared = g.op("Mul", [x32, x32], f"{name}/squared")
    mean = g.op("ReduceMean", [squared, g.ints([-1])], f"{name}/mean", keepdims=1)
    root = g.op("Sqrt", [g.op("Add", [mean, g.scalar(eps, FLOAT)], f"{name}/shifted")], f"{name}/root")
    normal = g.op("Div", [x32, root], f"{name}/normal")
    narrow = normal if wide else g.op("Cast", [normal], f"{name}/narrow", to=g.float_type)
    return g.op("Mul", [narrow, weight], name)


def rotate(
    g: Graph, x_BNTD: str, cos_SF: str, sin_SF: str, positions_BT: str, head_dim: int, dims: int, name: str
) -> str:
    """Rotary embedding: value i of a head turns with value i + F; values from `dims` on stay."""
    cos, sin = (
        g.op("Unsqueeze", [g.op("Gather", [t, positions_BT], f"{t}/rows", axis=0), g.ints([1])], f"{t}/heads")
        for t in (cos_SF, sin_SF)
    )
    sizes = [dims // 2, dims // 2] + ([head_dim - dims] if dims < head_dim else [])
    first, second, *rest = g.split(x_BNTD, sizes, [f"{name}/part_{i}" for i in range(len(sizes))])
    a_cos = g.op("Mul", [first, cos], f"{name}/a_cos")
    b_sin = g.op("Mul", [second, sin], f"{name}/b_sin")
    b_cos = g.op("Mul", [second, cos], f"{name}/b_cos")
    a_sin = g.op("Mul", [first, sin], f"{name}/a_sin")
    turned = [g.op("Sub", [a_cos, b_sin], f"{name}/turned_a"), g.op("Add", [b_cos, a_sin], f"{name}/turned_b")]
    return g.op("Concat", [*turned, *rest], name, axis=-1)


def update_cache(
    g: Graph, past_BKSD: str, new_BKTD: str, positions_BT: str, write_indices_B: str, kv_heads: int, name: str
) -> str:
    """The cache with `new` in each sequence's slots `positions`, by ScatterND over `[B, K, T]` index triples."""
    del write_indices_B
    shape = g.op("Concat", ["sizes/batch", g.ints([kv_heads]), "sizes/tokens"], "cache/shape", axis=0)
    batch = g.op("Range", [g.ints(0), "sizes/batch_scalar", g.ints(1)], "cache/batch")
    triples = []
    for label, value, axes in (
        ("batch", batch, [1, 2]),
        ("head", g.ints(list(range(kv_heads))), [0, 2]),
        ("slot", positions_BT, [1]),
    ):
        aligned = g.op("Unsqueeze", [value, g.ints(axes)], f"cache/{label}_aligned")
        full = g.op("Expand", [aligned, shape], f"cache/{label}_full")
        triples.append(g.op("Unsqueeze", [full, g.ints([3])], f"cache/{label}_index"))
    indices = g.op("Concat", triples, "cache/indices", axis=-1)
    return g.op("ScatterND", [past_BKSD, indices, new_BKTD], name)


def attention(g: Graph, q_BKQD: str, k_BKSD: str, v_BKSD: str, mask_B1QS: str, softcap: float | None, name: str) -> str:
    """`softmax(q k^T + mask) v`, `[B, K, Q, D]`, of scaled queries."""
    bias = g.op("Where", [mask_B1QS, g.scalar(0.0), g.scalar(LOWEST)], f"{mask_B1QS}/bias")
    turned = g.op("Transpose", [k_BKSD], f"{name}/keys_turned", perm=[0, 1, 3, 2])
    scores = g.op("MatMul", [q_BKQD, turned], f"{name}/scores")
    if softcap is not None:
        scores = cap(g, scores, softcap, f"{name}/capped")
    weights = g.op("Softmax", [g.op("Add", [scores, bias], f"{name}/masked")], f"{name}/weights", axis=-1)
    return g.op("MatMul", [weights, v_BKSD], name)


def cap(g: Graph, x: str, limit: float, name: str) -> str:
    """`limit * tanh(x / limit)`."""
    small = g.op("Mul", [x, g.scalar(1.0 / limit)], f"{name}/small")
    return g.op("Mul", [g.op("Tanh", [small], f"{name}/tanh"), g.scalar(limit)], name)
