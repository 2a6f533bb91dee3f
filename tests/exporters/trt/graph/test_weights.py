"""INT4 packing against onnx's own reading of it, and what float16 cannot hold."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file

from compress.errors import ArtifactError
from exporters.trt.graph.lint import unpack_int4
from exporters.trt.graph.weights import pack_int4
from exporters.trt.graph.write import write_graph


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_pack_int4_is_onnx_int4(rows: int, columns: int, seed: int) -> None:
    """Odd counts too: the last byte is half empty."""
    codes = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    data = pack_int4(codes)
    entry = onnx.TensorProto(name="w", data_type=TensorProto.INT4, dims=(rows, columns), raw_data=data)
    wanted = codes.numpy().astype(np.int8) - 8
    assert (numpy_helper.to_array(entry).astype(np.int8) == wanted).all()
    assert (unpack_int4(data, (rows, columns)) == wanted).all()


def test_dequantize_linear_of_packed_codes_is_the_formula() -> None:
    """Through onnx's reference evaluator: (code - 8) * scale, each block of rows with its own scale."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (32, 6), generator=generator, dtype=torch.uint8)
    scales = torch.rand((4, 6), generator=generator).half() + 0.01
    entry = onnx.TensorProto(name="w", data_type=TensorProto.INT4, dims=(32, 6), raw_data=pack_int4(codes))
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["w", "s"], ["y"], axis=0, block_size=8)],
        "dq", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [32, 6])],
        [entry, numpy_helper.from_array(scales.numpy(), "s")],
    )  # fmt: skip
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    (found,) = onnx.reference.ReferenceEvaluator(model).run(None, {})
    wanted = (codes.float() - 8) * scales.float().repeat_interleave(8, dim=0)
    assert (found == wanted.half().numpy()).all()


def test_values_beyond_float16_are_refused(build_model: Any, tmp_path: Path) -> None:
    model = build_model()
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 7e4
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match=r"layers.1.mlp.up_proj.weight reaches 7e\+04, beyond float16"):
        write_graph(model, tmp_path / "out", opset=24, capacity=64)
