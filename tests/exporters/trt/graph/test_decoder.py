"""The graph computes what transformers computes: every family, both dialects, exactly in float32."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from compress.errors import UnsupportedError
from compress.model import StreamedModel
from compress.runtime.ort import open_session
from exporters import reference
from exporters.trt.graph import architecture, decoder, run
from exporters.trt.graph.lint import lint
from exporters.trt.graph.weights import Weights
from exporters.trt.graph.write import GRAPH, write_graph

pytest.importorskip("onnxruntime")

CAPACITY = 64
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama, scaled rotation": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama, linear rotation": (
        "Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama, no groups": ("Llama", {"num_key_value_heads": 4}),
    "mistral, window": ("Mistral", {"sliding_window": 9}),
    "qwen2": ("Qwen2", {"drop": ("head_dim",), "tie_word_embeddings": True}),
    "qwen2, windows": (
        "Qwen2", {"drop": ("head_dim",), "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {}),
    "phi3": ("Phi3", {"drop": ("head_dim",)}),
    "phi3, partial rotation": (
        "Phi3",
        {"drop": ("head_dim",), "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
         "partial_rotary_factor": 0.5}},
    ),
    "phi3, window": ("Phi3", {"drop": ("head_dim",), "sliding_window": 9}),
    "gemma": ("Gemma", {"num_key_value_heads": 1}),
    "gemma2": ("Gemma2", {"sliding_window": 9, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0}),
    "gemma3": ("Gemma3Text", {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}),
}  # fmt: skip


def export(artifact: Path, folder: Path, opset: int, **options: Any) -> Any:
    folder.mkdir()
    write_graph(artifact, folder, opset=opset, capacity=CAPACITY, **options)
    onnx.checker.check_model(str(folder / GRAPH), full_check=True)
    return open_session(folder / GRAPH)


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_graph_equals_transformers(name: str, build_model: Any, tmp_path: Path) -> None:
    family, changes = FAMILIES[name]
    model = build_model(family, **changes)
    wanted = reference.of_artifact(model)
    for opset in (24, 21):
        session = export(model, tmp_path / str(opset), opset, float_type=onnx.TensorProto.FLOAT)
        found = run.logits_TV(session, wanted.ids_T, wanted.prefill)
        # float32 rounds at 6e-8; a few hundred roundings in another order stay below 1e-5, a wrong fold does not
        reference.compare(found, wanted, tolerance=1e-5, what=f"{name}, opset {opset}")


@pytest.mark.parametrize("also", [(), ("lm_head.weight",)])
def test_int4_graph_equals_the_dequantized_model(
    also: tuple[str, ...], build_model: Any, round_to_nearest: Any, tmp_path: Path
) -> None:
    """Codes, scales, blocks and layout: the reference dequantizes by other code, and multiplies in float32 too."""
    model = build_model("Qwen2", drop=("head_dim",), dtype="float16", tie_word_embeddings=False)
    artifact = round_to_nearest(model, tmp_path / "artifact", 32, also)
    wanted = reference.of_artifact(artifact)
    for opset in (24, 21):
        session = export(artifact, tmp_path / str(opset), opset, float_type=onnx.TensorProto.FLOAT)
        found = run.logits_TV(session, wanted.ids_T, wanted.prefill)
        reference.compare(found, wanted, tolerance=1e-5, what=f"int4, opset {opset}")
        assert lint(tmp_path / str(opset) / GRAPH, artifact, opset)["quantized_layers_compared"] == 14 + len(also)


@pytest.mark.parametrize("opset", [24, 21])
def test_a_prompt_may_enter_in_pieces(opset: int, build_model: Any, tmp_path: Path) -> None:
    """7 tokens, then 9 behind them, then 4: the same logits as 20 at once."""
    session = export(
        build_model("Mistral", sliding_window=6), tmp_path / "out", opset, float_type=onnx.TensorProto.FLOAT
    )
    ids = torch.randint(1, 4096, (20,), generator=torch.Generator().manual_seed(2))
    whole = run.logits_TV(session, ids, 20).numpy()
    names = [o.name for o in session.get_outputs()]
    past = {i.name: np.zeros((1, *i.shape[1:]), np.float32) for i in session.get_inputs() if i.name.startswith("past_")}
    for start, stop in ((0, 7), (7, 16), (16, 20)):
        feeds = {"input_ids": ids[None, start:stop].numpy(), "write_indices": np.array([start])}
        asked = np.array([[stop - start - 1, 0]])  # the last token and the first, in this order
        logits, *presents = session.run(names, {**feeds, "logits_indices": asked, **past})
        past = dict(zip(past, presents, strict=True))
        assert np.allclose(logits[0], whole[[stop - 1, start]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("opset", [24, 21])
def test_sequences_of_a_batch_do_not_see_each_other(opset: int, build_model: Any, tmp_path: Path) -> None:
    """Three prompts of 5, 9 and 12 tokens, padded on the right, then two steps: each as if it were alone."""
    model = build_model("Qwen3")
    session = export(model, tmp_path / "out", opset, float_type=onnx.TensorProto.FLOAT)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, 4096, (n + 2,), generator=generator) for n in (5, 9, 12)]
    lengths = np.array([len(p) - 2 for p in prompts])
    ids = np.zeros((3, 12), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : lengths[row]] = prompt[:-2]
    names = [o.name for o in session.get_outputs()]
    past = {i.name: np.zeros((3, *i.shape[1:]), np.float32) for i in session.get_inputs() if i.name.startswith("past_")}
    last = (lengths - 1)[:, None]
    out = session.run(names, {"input_ids": ids, "write_indices": np.zeros(3, np.int64), "logits_indices": last, **past})
    found = [out[0][:, 0]]
    for step in range(2):
        past = dict(zip(past, out[1:], strict=True))
        tokens = np.array([[int(p[n + step])] for p, n in zip(prompts, lengths, strict=True)])
        feeds = {"input_ids": tokens, "write_indices": lengths + step, "logits_indices": np.zeros((3, 1), np.int64)}
        out = session.run(names, {**feeds, **past})
        found.append(out[0][:, 0])
    for row, prompt in enumerate(prompts):
        alone = run.logits_TV(session, prompt, len(prompt))[lengths[row] - 1 :].numpy()
        assert np.allclose(np.stack([f[row] for f in found]), alone, atol=1e-4, rtol=1e-4)


def test_float16_error_is_that_of_float16(reference_model: Path, tmp_path: Path) -> None:
    """On the reference model, whose activations are those of real text models: 3 to 4e-4 measured, u = 4.9e-4."""
    wanted = reference.of_artifact(reference_model)
    for opset in (24, 21):
        session = export(reference_model, tmp_path / str(opset), opset)
        found = run.logits_TV(session, wanted.ids_T, wanted.prefill)
        error = reference.compare(found, wanted, tolerance=2e-3, what="float16")["relative_error"]
        assert error > 1e-5  # it is float16: the float32 graph is at 5e-7


def test_other_models_are_refused_by_name(build_model: Any) -> None:
    model = build_model("Olmo2", drop=("head_dim",))
    with pytest.raises(UnsupportedError, match="olmo2 is not supported by onnx-trt yet"):
        architecture.read(StreamedModel.open(model))


def test_encoders_are_refused(build_model: Any) -> None:
    model = build_model("Gemma3Text", use_bidirectional_attention=True)
    with pytest.raises(UnsupportedError, match="reads a text in both directions"):
        architecture.read(StreamedModel.open(model))


def test_parameters_that_the_graph_would_leave_out_are_refused(build_model: Any, tmp_path: Path) -> None:
    """Llama's config with Qwen 3's norms of queries and keys, as a model derived from Llama might have."""
    model = StreamedModel.open(build_model("Qwen3"))
    arch = architecture.read(model)
    plain = dataclasses.replace(arch, family=dataclasses.replace(arch.family, qk_norm=False))
    weights = Weights(model, onnx.TensorProto.FLOAT)
    with pytest.raises(
        UnsupportedError, match=r"self_attn.k_norm.weight is not supported .*4 parameters would be left"
    ):
        decoder.build(plain, weights, opset=24, capacity=64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary scaling 'dynamic'"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
    ],
)
def test_what_the_graph_cannot_express_is_refused(build_model: Any, change: dict[str, Any], message: str) -> None:
    folder = build_model("Llama")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UnsupportedError, match=message):
        architecture.read(StreamedModel.open(folder))
