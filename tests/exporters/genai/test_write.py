"""The `onnx` format: what is written computes what the artifact says, and whatever would not is caught."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError, CompressError, ConfigError, UnsupportedError
from compress.files import file_sha256
from compress.formats import stored
from compress.quantize.awq_stage import AwqRequest, quantize_awq
from compress.runtime.ort_decoder import OrtDecoder
from compress.scheme import Scheme
from compress.workspace import resolve
from exporters.reader import Job, Written
from exporters.sizing.targets import TARGETS

pytest.importorskip("onnxruntime_genai", reason="ONNXRUNTIME-GENAI ABSENT: the onnx format was not tested")

from exporters import reference  # noqa: E402
from exporters.genai import graph as genai_graph
from exporters.genai import head as genai_head
from exporters.genai import write as onnx_genai
from exporters.genai.bundle.run import Decoder
from exporters.genai.check import compare_weights, node_weights  # noqa: E402

CPU = TARGETS["cpu"]
TEXT = "the old house stood by the river and nobody had lived there for many years since the war " * 60


@pytest.fixture
def quantize(tmp_path: Path) -> Callable[..., Path]:
    """A small AWQ INT4 artifact of a model."""

    def run(model: Path, *, symmetric: bool = False, **changes: Any) -> Path:
        calib = tmp_path / "calib.txt"
        calib.write_text(TEXT, encoding="utf-8")
        out = tmp_path / f"{model.name}-int4"
        request = AwqRequest(
            source=resolve(str(model)), out=out, scheme=Scheme(group_size=32, symmetric=symmetric), calib=str(calib),
            samples=4, seq_len=64, **changes,
        )  # fmt: skip
        return quantize_awq(request).out

    return run


def export(artifact: Path, out: Path, context: int = 256, **options: Any) -> Written:
    out.mkdir()
    return onnx_genai.write(Job(artifact=artifact, target=CPU, context=context, batch=1, staged=out, options=options))


def contents(folder: Path) -> dict[str, str]:
    return {p.name: file_sha256(p) for p in sorted(folder.iterdir())}


# Windows below the 48 tokens of the check, so that a window that is ignored shows.
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2": {"drop": ("head_dim",)},
    "Qwen3": {},
    "Mistral": {"sliding_window": 24},
    "Phi3": {"drop": ("head_dim",), "original_max_position_embeddings": 256, "sliding_window": 24},
    "Gemma": {"hidden_size": 96, "num_attention_heads": 6},  # a scale of sqrt(96), which the builder rounds
    "Gemma2": {"sliding_window": 24, "query_pre_attn_scalar": 16},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, build_model: Any, quantize: Any, tmp_path: Path) -> None:
    """INT4, asymmetric; `write` itself compares weights and logits, so reaching the end is the assertion."""
    model = build_model(family, dtype="float16", tie_word_embeddings=family.startswith("Gemma"), **FAMILIES[family])
    written = export(quantize(model), tmp_path / "out")
    verified = written.record["verified"]
    assert verified["relative_error"] < 1e-5
    assert verified["layers_compared"] == {"quantized": 8 if family == "Phi3" else 14, "dense": 0}


@pytest.mark.slow
def test_symmetric_and_repeatable(build_model: Any, quantize: Any, tmp_path: Path) -> None:
    """No zero points where all are 8; two exports have the same bytes; the parts are the file."""
    artifact = quantize(build_model("Llama", dtype="float16"), symmetric=True)
    written = export(artifact, tmp_path / "first")
    export(artifact, tmp_path / "second")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    graph = genai_graph.Graph(tmp_path / "first")
    nodes = list(genai_graph.matmul_nbits(graph))
    assert len(nodes) == 2 * 4 and all(len(n.input) == 3 for n in nodes)  # q, k, v are one node; gate and up another
    assert all(genai_graph.attribute(n, "accuracy_level") == 1 for n in nodes)
    size = (tmp_path / "first" / "model.onnx.data").stat().st_size
    weights = sum(b for name, b in written.parts.items() if name != "graph")
    assert weights <= size < weights + 4096 * len(graph.tensors)
    assert written.parts["lm_head"] == written.parts["embedding"] == 4096 * 64 * 2  # float16, as in the artifact


@pytest.mark.slow
def test_layers_left_dense(build_model: Any, quantize: Any, tmp_path: Path) -> None:
    """`--skip`: the builder cannot read such a folder, and gets one with placeholders that are then replaced."""
    skip = ("layers.0.self_attn.k_proj", "layers.1.mlp.up_proj", "layers.1.self_attn.o_proj")
    written = export(quantize(build_model("Qwen2", dtype="float16", drop=("head_dim",)), skip=skip), tmp_path / "out")
    assert written.record["verified"]["layers_compared"] == {"quantized": 11, "dense": 3}
    assert written.record["verified"]["relative_error"] < 1e-5


@pytest.mark.slow
def test_dense(build_model: Any, cold_builder: None, tmp_path: Path) -> None:
    """An unquantized folder keeps its own width on disk and is computed in float32."""
    model = build_model("Llama", dtype="bfloat16", tie_word_embeddings=True)
    written = export(model, tmp_path / "out")
    linears = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert written.parts["decoder linears"] == linears * 2
    assert written.parts["embedding"] == 4096 * 64 * 2 and written.parts["lm_head"] == 0
    assert written.record["verified"]["relative_error"] < 1e-5


@pytest.mark.slow
def test_int8_activations_are_asked_for_and_seen(llama: Path, tmp_path: Path) -> None:
    """The builder's default (accuracy level 4) changes the numbers by more than the check lets pass."""
    written = export(llama, tmp_path / "int8", activations="int8", head="float")
    assert written.record["activations"] == "int8" and "int8, as you asked" in written.notes[-1]
    assert written.record["verified"]["relative_error"] > 10 * onnx_genai.TOLERANCES["float32"]
    expected = reference.of_artifact(llama)
    with pytest.raises(ArtifactError, match="differ from the artifact's"):
        found = onnx_genai.decoded(tmp_path / "int8", expected)
        reference.compare(found, expected, tolerance=onnx_genai.TOLERANCES["float32"], what="onnx")
    graph = genai_graph.Graph(tmp_path / "int8")
    split = genai_graph.split_activations(graph)
    assert split == 2 * 4
    (tmp_path / "int16").mkdir()
    for name in ("genai_config.json",):
        shutil.copyfile(tmp_path / "int8" / name, tmp_path / "int16" / name)
    shown = next(n for n in genai_graph.matmul_nbits(graph) if genai_graph.is_identity(n))
    compare_weights(graph, stored(Checkpoint.open(llama)))
    codes = np.array(graph.array(shown.input[1]))
    graph.set(shown.input[1], codes << 1)
    with pytest.raises(ArtifactError, match="does not multiply by 1, so inputs lose bits"):
        compare_weights(graph, stored(Checkpoint.open(llama)))
    graph.set(shown.input[1], codes)
    graph.save(tmp_path / "int16", "test")
    in_two_parts = onnx_genai.decoded(tmp_path / "int16", expected)
    error = reference.compare(in_two_parts, expected, tolerance=onnx_genai.TOLERANCES["int16"], what="onnx")
    assert (
        error["relative_error"] < written.record["verified"]["relative_error"] / 50
    )  # 7 more bits are a factor of 128


@pytest.mark.slow
def test_output_matrix_in_8_bits(llama: Path, tmp_path: Path) -> None:
    """Asked for, seen in the numbers and the bytes, and compared value by value; the embedding stays."""
    plain = export(llama, tmp_path / "plain", activations="int16", head="float")
    narrow = export(llama, tmp_path / "narrow", activations="int16")
    assert narrow.record["head"] == "int8" and "head" not in plain.record
    assert narrow.parts["embedding"] == plain.parts["embedding"]
    table = stored(Checkpoint.open(llama)).checkpoint.tensor("model.embed_tokens.weight")
    assert narrow.parts["lm_head"] == table.numel() * 17 // 16  # a byte a weight, four for 64
    errors = [w.record["verified"]["relative_error"] for w in (plain, narrow)]
    assert errors[0] < 1e-3 < errors[1] < onnx_genai.HEAD_TOLERANCE
    graph = genai_graph.Graph(tmp_path / "narrow")
    weight_VH = onnx_genai.output_matrix(Checkpoint.open(llama))
    genai_head.compare(graph, weight_VH)
    codes = np.array(graph.array(genai_head.CODES))
    codes[7, 0, 35] ^= 2
    graph.set(genai_head.CODES, codes)
    with pytest.raises(ArtifactError, match="row 7, column 35 of the output matrix is more than half a step"):
        genai_head.compare(graph, weight_VH)
    with pytest.raises(ConfigError, match="--head int8: .* the activations here are float32"):
        export(llama, tmp_path / "refused", head="int8")


@given(st.integers(0, 2**31), st.sampled_from([1, 3, 5]), st.sampled_from(genai_head.BLOCKS))
def test_codes_of_an_output_matrix(seed: int, rows: int, block: int) -> None:
    """Within half a step, the largest of a block exact, zeros exact; one value at a time."""
    rng = np.random.default_rng(seed)
    w_RH = rng.standard_normal((rows, 2 * block)).astype(np.float32) * rng.choice([1e-6, 1.0, 1e4])
    w_RH[0, :block] = 0
    codes, scales = genai_head.quantize(w_RH, block)
    for row, column in np.ndindex(w_RH.shape):
        step = float(scales[row, column // block])
        code = int(codes[row, column // block, column % block]) - 128
        assert abs(code * step - float(w_RH[row, column])) <= 0.5001 * step
    assert (np.abs(codes.astype(int) - 128).max(axis=2)[:, 1:] == 127).all()


# ---- one asymmetric INT4 Llama, exported once ---------------------------------------------------------------


@pytest.fixture
def llama(exported: tuple[Path, Path]) -> Path:
    return exported[0]


@pytest.fixture
def graph(exported: tuple[Path, Path]) -> genai_graph.Graph:
    return genai_graph.Graph(exported[1])


@pytest.mark.parametrize("in_place", [True, False])
def test_the_toolkits_decoder(exported: tuple[Path, Path], in_place: bool, tmp_path: Path) -> None:
    """`compress generate` and `bench`: the bundle's logits, for two texts at once, again after a longer one."""
    folder = tmp_path / "out"
    shutil.copytree(exported[1], folder)
    if not in_place:
        config = json.loads((folder / "genai_config.json").read_text())
        config["search"]["past_present_share_buffer"] = False
        (folder / "genai_config.json").write_text(json.dumps(config))
    ids_BT = torch.tensor([[5, 80, 300, 12, 7, 900, 41], [9, 2, 77, 1500, 8, 8, 60]])
    decoder = OrtDecoder.open(folder, capacity=16, batch=2)
    assert decoder.runner.shares_caches is in_place
    decoder.prefill(torch.cat([ids_BT.flip(1), ids_BT], dim=1))
    found = [decoder.prefill(ids_BT[:, :4]).clone(), *(decoder.step(ids_BT[:, t]).clone() for t in (4, 5, 6))]
    for row, ids in enumerate(ids_BT.tolist()):
        bundled = Decoder(folder, capacity=16)
        wanted = [bundled.prefill(ids[:4]).copy(), *(bundled.forward([token])[-1].copy() for token in ids[4:])]
        for mine, other in zip(found, wanted, strict=True):
            assert np.linalg.norm(mine[row].numpy() - other) < 1e-5 * np.linalg.norm(other)


def test_every_weight_is_the_artifacts(llama: Path, graph: genai_graph.Graph) -> None:
    """Against the toolkit's own reader: dequantized node by node, q, k and v stacked, zero points real."""
    checkpoint = Checkpoint.open(llama)
    asymmetric = 0
    for node in genai_graph.matmul_nbits(graph):
        found = node_weights(graph, node)
        block, room, part = node.name.removeprefix("/model/layers.").split("/")[:3]
        fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
        members = fused.get(part, (part,))
        meant = []
        for member in members:
            layer = f"model.layers.{block}.{'self_attn' if room == 'attn' else 'mlp'}.{member}"
            meant.append(stored(checkpoint).dense(layer))
        shifted = found.codes.astype(np.float32) - np.repeat(found.zeros, 32, axis=1)
        assert np.array_equal(shifted * np.repeat(found.scales, 32, axis=1), torch.cat(meant).numpy()), node.name
        asymmetric += int((found.zeros != 8).any())
    assert asymmetric == 8
    assert np.array_equal(graph.array(genai_graph.EMBEDDING), checkpoint.tensor(genai_graph.EMBEDDING).numpy())
    assert np.array_equal(graph.array(genai_graph.LM_HEAD), checkpoint.tensor(genai_graph.LM_HEAD).numpy())


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_one_changed_weight_is_found(part: str, llama: Path, graph: genai_graph.Graph, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(llama, changed)
    tensors = load_file(changed / "model.safetensors")
    value = tensors[f"model.layers.1.mlp.up_proj.{part}"]
    value[-1, -1] = value[-1, -1] * 2 if part == "scales" else value[-1, -1] ^ (1 << 20)
    save_file(tensors, changed / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"layers\.1/mlp/gate_up_proj.*differ .* in 1 of"):
        compare_weights(graph, stored(Checkpoint.open(changed)))


def test_a_missing_layer_is_found(llama: Path, graph: genai_graph.Graph) -> None:
    node = next(n for n in graph.nodes if n.name.endswith("layers.0/attn/o_proj/MatMulNBits"))
    graph.nodes.remove(node)
    with pytest.raises(ArtifactError, match=r"layers\.0\.self_attn\.o_proj: 0 of its 64 rows"):
        compare_weights(graph, stored(Checkpoint.open(llama)))


def test_a_quantized_lm_head_is_found(llama: Path, graph: genai_graph.Graph) -> None:
    """What the builder does unless it is told not to."""
    node = next(n for n in graph.nodes if n.name == "/lm_head/MatMul")
    node.op_type = "MatMulNBits"
    with pytest.raises(ArtifactError, match="no such layer"):
        compare_weights(graph, stored(Checkpoint.open(llama)))


def test_onnxruntime_genai_reads_the_folder(exported: tuple[Path, Path]) -> None:
    """Its own generator gives the tokens that the bundle's decoder gives."""
    import onnxruntime_genai

    from exporters.genai.bundle.run import Decoder, generate

    folder = exported[1]
    prompt = [5, 77, 1234, 9, 600]
    model = onnxruntime_genai.Model(str(folder))
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + 12, do_sample=False)
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(np.array([prompt], np.int32))
    theirs = []
    while not generator.is_done() and len(theirs) < 12:
        generator.generate_next_token()
        theirs.append(int(generator.get_next_tokens()[0]))
    greedy = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
    ours = list(generate(Decoder(folder, capacity=32), prompt, 12, greedy, seed=0))
    assert len(ours) == 12 and theirs == ours


def test_what_the_folder_holds(exported: tuple[Path, Path]) -> None:
    folder = exported[1]
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "run.py", "requirements.txt"} <= {
        p.name for p in folder.iterdir()
    }
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["search"]["max_length"] == 128  # the context that was asked for
    shapes = [i.type.tensor_type.shape.dim for i in genai_graph.Graph(folder).model.graph.input if "past" in i.name]
    assert [(d[1].dim_value, d[3].dim_value) for d in shapes] == 4 * [(2, 16)]  # what `compress evaluate` needs
    producer = genai_graph.Graph(folder).model.producer_version
    assert "+" not in producer  # the builder stamps the commit of the repository it is started in


# ---- refusals -----------------------------------------------------------------------------------------------


def refused(folder: Path, tmp_path: Path, error: type[CompressError], match: str, **options: Any) -> None:
    out = tmp_path / "refused"
    with pytest.raises(error, match=match):
        export(folder, out, **options)
    assert not list(out.iterdir())


def with_config(folder: Path, tmp_path: Path, **changes: Any) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


def test_unknown_architecture(build_model: Any, tmp_path: Path) -> None:
    model = build_model("Olmo2", drop=("head_dim",))
    refused(model, tmp_path, UnsupportedError, "Olmo2ForCausalLM is not supported by onnx yet")


def test_a_quantized_lm_head(llama: Path, tmp_path: Path) -> None:
    folder = with_config(llama, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.qweight"] = torch.zeros(64, 512, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, tmp_path, UnsupportedError, "its lm_head is quantized")


def test_rotary_tables_that_change_with_the_length(llama: Path, tmp_path: Path) -> None:
    folder = with_config(llama, tmp_path, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    refused(folder, tmp_path, UnsupportedError, "rope_type 'dynamic' changes with the length")


def test_context_beyond_the_models(llama: Path, tmp_path: Path) -> None:
    refused(llama, tmp_path, ConfigError, "--context 512: .* 256 tokens", context=512)


def test_int8_activations_of_a_dense_model(build_model: Any, tmp_path: Path) -> None:
    refused(build_model("Llama"), tmp_path, ConfigError, "these are dense", activations="int8")


def test_unknown_activations(llama: Path, tmp_path: Path) -> None:
    refused(llama, tmp_path, ConfigError, "'int4': choose one of float32, int16, int8", activations="int4")


def test_the_builders_own_failure_is_told(build_model: Any, tmp_path: Path) -> None:
    """An activation that it does not know: its last words, and nothing is left behind."""
    folder = with_config(build_model("Llama"), tmp_path, hidden_act="mish")
    refused(folder, tmp_path, UnsupportedError, "not supported by onnx yet: .*builder stopped.*mish")


def test_every_end_of_text_is_written(tmp_path: Path) -> None:
    """A chat model has several: what ends a turn, and what ends a text."""
    assert onnx_genai.ends(2, tmp_path) == 2
    for stated, found, wanted in ((2, 2, 2), ([2, 7], 2, [2, 7]), ([9, 2], [2, 5], [2, 5, 9]), (None, [2], [2])):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
        assert onnx_genai.ends(found, tmp_path) == wanted
