"""Graphs with caches: fixed capacity as our exporter writes them, free length as onnxruntime-genai's builder does."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from compress.errors import ConfigError, UnsupportedError
from compress.model import StreamedModel
from compress.runtime.ort import OnnxRunner
from compress.runtime.runner import Tokens
from evaluators import evaluate
from evaluators.request import EvaluationRequest
from exporters.trt.graph.write import write_graph

pytest.importorskip("onnxruntime")

SIZES = {"vocab": 48, "hidden": 32, "heads": 4, "kv_heads": 2, "size": 8}


@pytest.mark.parametrize("opset", [24, 21])
def test_fixed_caches_give_the_models_logits(opset: int, build_model: Any, tmp_path: Path) -> None:
    """Against transformers, for sequences shorter than, equal to and longer than the caches."""
    model = build_model("Qwen3")
    (tmp_path / "out").mkdir()
    write_graph(model, tmp_path / "out", opset=opset, capacity=40, float_type=TensorProto.FLOAT)
    runner = OnnxRunner.open(tmp_path / "out")
    assert runner.capacity == 40 and runner.vocab_size == 4096
    generator = torch.Generator().manual_seed(0)
    sequences = [Tokens(ids_T=torch.randint(0, 4096, (n,), generator=generator)) for n in (5, 40)]
    reading = runner.read(sequences)
    streamed = StreamedModel.open(model)
    for index, tokens in enumerate(sequences):
        hidden = streamed.embed(tokens.ids_T[None])
        for block in range(streamed.num_blocks):
            streamed.load_block(block)
            hidden = streamed.run_block(block, hidden)
        wanted = streamed.head(hidden)[0]
        found = reading.logits(index, 0, len(tokens.ids_T))
        assert torch.allclose(found, wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="hold 40 tokens and a sequence has 41.*--context 40 or less"):
        runner.read([Tokens(ids_T=torch.zeros(41, dtype=torch.int64))])


def test_an_export_is_a_candidate_of_evaluate(reference_model: Path, tmp_path: Path, calib_text: Path) -> None:
    """Float16 against its own float16 folder, through `evaluate`: what differs is rounding."""
    (tmp_path / "out").mkdir()
    write_graph(reference_model, tmp_path / "out", opset=24, capacity=64)
    chosen = {"threshold": 0.98, "context": 64, "max_tokens": 2048}
    request = EvaluationRequest(
        candidate=tmp_path / "out", reference=reference_model, data=str(calib_text), **chosen
    )  # fmt: skip
    found = evaluate.evaluate(request)
    value = {m.name: m.value for m in found.metrics}
    assert found.outcome == "PASS" and found.candidate.runtime == "onnxruntime"
    assert 0 < value["kl_mean"] < 1e-5 and value["top1_agreement"] > 0.99


def grouped_query_graph(folder: Path, dtype: Any) -> dict[str, np.ndarray[Any, Any]]:
    """One attention layer as onnxruntime-genai builds it: growing past, attention_mask, GroupQueryAttention."""
    rng = np.random.default_rng(0)
    v, h, n, k, d = SIZES.values()
    shapes = {"embed": (v, h), "q": (h, n * d), "k": (h, k * d), "v": (h, k * d), "o": (n * d, h), "head": (h, v)}
    weights = {name: (rng.standard_normal(shape) * 0.3).astype(dtype) for name, shape in shapes.items()}
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    node = helper.make_node
    nodes = [
        node("Gather", ["embed", "input_ids"], ["x"], axis=0),
        *(node("MatMul", ["x", name], [f"x{name}"]) for name in "qkv"),
        node("ReduceSum", ["attention_mask", "one_axis"], ["total"], keepdims=0),
        node("Sub", ["total", "one"], ["last"]),
        node("Cast", ["last"], ["seqlens_k"], to=TensorProto.INT32),
        node("Shape", ["attention_mask"], ["mask_shape"]),
        node("Gather", ["mask_shape", "one_scalar"], ["mask_length"], axis=0),
        node("Cast", ["mask_length"], ["total_length"], to=TensorProto.INT32),
        node(
            "GroupQueryAttention",
            ["xq", "xk", "xv", "past_key_values.0.key", "past_key_values.0.value", "seqlens_k", "total_length"],
            ["mixed", "present.0.key", "present.0.value"],
            domain="com.microsoft", num_heads=n, kv_num_heads=k,
        ),
        node("MatMul", ["mixed", "o"], ["out"]),
        node("MatMul", ["out", "head"], ["logits"]),
    ]  # fmt: skip
    constants = [
        numpy_helper.from_array(np.array([1], np.int64), "one_axis"),
        numpy_helper.from_array(np.array(1, np.int64), "one"),
        numpy_helper.from_array(np.array(1, np.int64), "one_scalar"),
    ]
    value = helper.make_tensor_value_info
    inputs = [
        value("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
        value("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]),
        *(
            value(f"past_key_values.0.{c}", kind, ["batch_size", k, "past_sequence_length", "kv_cache_dim"])
            for c in ("key", "value")
        ),
    ]
    outputs = [
        value("logits", kind, ["batch_size", "sequence_length", v]),
        *(
            value(f"present.0.{c}", kind, ["batch_size", k, "total_sequence_length", "kv_cache_dim"])
            for c in ("key", "value")
        ),
    ]
    initializers = [numpy_helper.from_array(w, name) for name, w in weights.items()] + constants
    graph = helper.make_graph(nodes, "genai", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=opsets), folder / "model.onnx")
    return weights


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float16, 1e-2)])
def test_past_of_free_length_starts_empty(dtype: Any, tolerance: float, tmp_path: Path) -> None:
    weights = {name: torch.from_numpy(w).double() for name, w in grouped_query_graph(tmp_path, dtype).items()}
    with pytest.raises(UnsupportedError, match="heads and size given there or in genai_config.json"):
        OnnxRunner.open(tmp_path)
    (tmp_path / "genai_config.json").write_text('{"model": {"decoder": {"head_size": 8, "num_key_value_heads": 2}}}')
    runner = OnnxRunner.open(tmp_path)
    assert runner.capacity is None
    ids = torch.tensor([3, 17, 40, 2, 2, 9, 31])
    x = weights["embed"][ids]
    _, _, n, k, d = SIZES.values()
    q, key, val = ((x @ weights[c]).reshape(len(ids), -1, d).transpose(0, 1) for c in "qkv")
    key, val = (t.repeat_interleave(n // k, dim=0) for t in (key, val))
    mixed = torch.nn.functional.scaled_dot_product_attention(q, key, val, is_causal=True)
    wanted = mixed.transpose(0, 1).reshape(len(ids), -1) @ weights["o"] @ weights["head"]
    found = runner.read([Tokens(ids_T=ids)]).logits(0, 0, len(ids))
    assert torch.allclose(found.double(), wanted, atol=tolerance * float(wanted.abs().max()), rtol=tolerance)


def test_fixed_past_without_write_indices_is_refused(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Cast", ["past_key_values.0.key"], ["logits"], to=TensorProto.FLOAT)],
        "fixed",
        [value("past_key_values.0.key", TensorProto.FLOAT16, [1, 2, 8, 4])],
        [value("logits", TensorProto.FLOAT, [1, 2, 8, 4])],
    )
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)]), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError, match=r"have lengths \[8\] without one capacity and write_indices"):
        OnnxRunner.open(tmp_path)
