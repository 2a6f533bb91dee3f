"""A wrong export is noticed: the exporter's count, and each weight, on a folder laid out by hand like its own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError
from exporters.edge import check as edge_check
from exporters.edge.folder import Handed, expected_dense, expected_int4

onnx = pytest.importorskip("onnx")
numpy_helper = pytest.importorskip("onnx.numpy_helper")
Make = Callable[..., Path]


def test_count_of_tensors_must_be_exact() -> None:
    handed = Handed(tensors=49, ignorable=2, notes=[])
    line = "02:13:57  INFO      tensorrt_edgellm.checkpoint.loader: Loaded {} tensors, skipped {} from in"
    assert edge_check.check_log(["noise", line.format(49, 2)], handed) == (49, 2)
    for loaded, skipped in ((7, 42), (49, 0), (48, 3)):  # 7 and 42: compressed-tensors, exit code 0
        with pytest.raises(
            ArtifactError, match=f"loaded {loaded} tensors and skipped {skipped}, but 49 and 2 were due"
        ):
            edge_check.check_log([line.format(loaded, skipped)], handed)
    with pytest.raises(ArtifactError, match="did not say how many"):
        edge_check.check_log(["Done"], handed)


def fragments(codes: torch.Tensor) -> np.ndarray:
    """The plugin's layout of codes `[N, K]`, N a multiple of 128: the inverse permutation of the reader's."""
    n, k = codes.shape
    indexed = codes.reshape(
        n // 128, 2, 2, 32, k // 64, 4, 2, 4, 2
    )  # tile half upper lane | tile block nibble lane low
    nibbles = indexed.permute(0, 4, 5, 1, 3, 7, 8, 2, 6).reshape(-1, 512, 2)
    return (nibbles[..., 0] | nibbles[..., 1] << 4).contiguous().view(torch.int8).numpy()


def export_by_hand(checkpoint: Checkpoint, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """model.onnx and embedding.safetensors with the artifact's weights, after `change` has had its way."""
    arrays: dict[str, Any] = {}
    nodes = []
    for name, weight in expected_int4(checkpoint):
        arrays[f"_model.{name}.qweight"] = fragments(weight.codes_OI)
        arrays[f"_model.{name}.scales"] = weight.scale_OG.t().contiguous().numpy()
        n, k = weight.codes_OI.shape
        inputs = ["x", f"_model.{name}.qweight", f"_model.{name}.scales"]
        domain = {"domain": "trt_edgellm", "gemm_n": n, "gemm_k": k, "group_size": 128}
        nodes.append(onnx.helper.make_node(edge_check.INT4, inputs, [name], **domain))
    for name, value in expected_dense(checkpoint):
        arrays["embedding" if name == "model.embed_tokens.weight" else f"_model.{name}"] = value.numpy()
    change(arrays)
    folder.mkdir()
    save_file({"embedding": torch.from_numpy(arrays.pop("embedding"))}, folder / "embedding.safetensors")
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT16, [1, 1])
    stored = [numpy_helper.from_array(value, name) for name, value in arrays.items()]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [x], [x], stored))
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    return folder


DOWN = "_model.model.layers.1.mlp.down_proj"


def test_equal_weights_are_counted(awq_folder: Make, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(awq_folder())
    counts = edge_check.check_weights(checkpoint, export_by_hand(checkpoint, tmp_path / "llm", lambda arrays: None))
    q, kv, o, mlp = 256 * 256, 2 * 128 * 256, 256 * 256, 3 * 256 * 384
    assert counts == {
        "int4_layers": 14, "int8_layers": 0, "codes": 2 * (q + kv + o + mlp), "scales": 2 * (q + kv + o + mlp) // 128,
        "float16_tensors": 7,
    }  # fmt: skip


def one_code(arrays: dict[str, Any]) -> None:
    arrays[f"{DOWN}.qweight"] = arrays[f"{DOWN}.qweight"].copy()
    arrays[f"{DOWN}.qweight"].view(np.uint8)[3, 17] ^= 1


def one_scale(arrays: dict[str, Any]) -> None:
    arrays[f"{DOWN}.scales"][2, 5] *= np.float16(1.01)


def one_embedding(arrays: dict[str, Any]) -> None:
    arrays["embedding"] = arrays["embedding"].copy()
    arrays["embedding"][4000, 7] += 1


def never_loaded(arrays: dict[str, Any]) -> None:
    arrays[f"{DOWN}.qweight"] = np.zeros_like(arrays[f"{DOWN}.qweight"])


def renamed(arrays: dict[str, Any]) -> None:
    arrays["_model.lm_head.other"] = arrays.pop("_model.lm_head.weight") + np.float16(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_code, "down_proj codes differs from the artifact in 1 of 98304 values"),
        (one_scale, "down_proj scales differs from the artifact in 1 of 768 values"),
        (one_embedding, "embed_tokens.weight differs from the artifact in 1 of"),
        (never_loaded, r"down_proj codes differs from the artifact in \d+ of"),
        (renamed, "lm_head.weight is missing"),
    ],
)
def test_one_wrong_value_is_enough(change: Any, message: str, awq_folder: Make, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(awq_folder())
    folder = export_by_hand(checkpoint, tmp_path / "llm", change)
    with pytest.raises(ArtifactError, match=f"{message}.*was not kept|{message}"):
        edge_check.check_weights(checkpoint, folder)


def test_asymmetric_codes_never_pass(awq_folder: Make, tmp_path: Path) -> None:
    """Even an export that holds the very codes is refused: the plugin subtracts 8, the artifact something else."""
    checkpoint = Checkpoint.open(awq_folder(symmetric=False))
    folder = export_by_hand(checkpoint, tmp_path / "llm", lambda arrays: None)
    with pytest.raises(ArtifactError, match="zero points other than 8 in the artifact"):
        edge_check.check_weights(checkpoint, folder)


def test_a_product_that_the_artifact_has_not_is_noticed(awq_folder: Make, tmp_path: Path) -> None:
    artifact = awq_folder()
    folder = export_by_hand(Checkpoint.open(artifact), tmp_path / "llm", lambda arrays: None)
    config = json.loads((artifact / "config.json").read_text())
    del config["quantization_config"]
    (artifact / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="is quantized, though the artifact's is not"):
        edge_check.check_weights(Checkpoint.open(artifact), folder)


def fused(arrays: dict[str, Any]) -> None:
    """What the exporter makes of unquantized projections: transposed, query, key and value in one, names gone."""
    for layer in range(2):
        above = f"_model.model.layers.{layer}"
        parts = [arrays.pop(f"{above}.self_attn.{which}_proj.weight") for which in "qkv"]
        arrays[f"val_{layer}"] = np.ascontiguousarray(np.concatenate(parts).T)
        for which in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            arrays[f"val_{layer}_{which}"] = np.ascontiguousarray(arrays.pop(f"{above}.{which}.weight").T)


def test_unquantized_projections_are_found_by_content(build_model: Make, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(build_model(dtype="float16"))
    folder = export_by_hand(checkpoint, tmp_path / "llm", fused)
    counts = edge_check.check_weights(checkpoint, folder)
    assert counts == {"int4_layers": 0, "int8_layers": 0, "codes": 0, "scales": 0, "float16_tensors": 21}

    def wrong(arrays: dict[str, Any]) -> None:
        fused(arrays)
        arrays["val_1"][5, 70] += 1  # inside the keys: 64 columns of queries, then 32

    with pytest.raises(ArtifactError, match="layers.1.self_attn.k_proj.weight is missing"):
        edge_check.check_weights(checkpoint, export_by_hand(checkpoint, tmp_path / "bad", wrong))
