"""Weights beside the model file, also where a protobuf and a 32-bit offset end."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from compress.errors import ArtifactError
from exporters.trt.graph.external import ALIGNMENT, DataFile, Stored, packed_bytes, place, read_bytes
from exporters.trt.graph.weights import array


def test_offsets_beyond_4_gb_are_read_by_onnxruntime(tmp_path: Path) -> None:
    """The second weight lies past 5 GB in a file with a hole; ONNX Runtime and onnx find it there."""
    onnxruntime = pytest.importorskip("onnxruntime")
    a, b = np.arange(12, dtype=np.float32).reshape(3, 4), np.full((40000, 4), 0.5, np.float32)
    with DataFile(tmp_path / "big.data") as data:
        first = data.append(array("a", a))
        data.skip(5 << 30)
        second = data.append(array("b", b))
    where = place(second)
    assert where is not None and where.offset > 5 << 30 and where.offset % ALIGNMENT == 0
    assert (tmp_path / "big.data").stat().st_blocks * 512 < 16 << 20, "the hole must not take space"
    graph = helper.make_graph(
        [helper.make_node("Gather", ["b", "i"], ["rows"], axis=0), helper.make_node("Add", ["a", "rows"], ["y"])],
        "big",
        [helper.make_tensor_value_info("i", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 4])],
        [first, second],
    )
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)]), tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"i": np.array([39999])})
    assert (found == a + 0.5).all()
    assert read_bytes(tmp_path, second) == b.tobytes()


def test_wrong_number_of_bytes_is_an_error(tmp_path: Path) -> None:
    short = Stored(name="w", data_type=TensorProto.FLOAT16, dims=(4, 4), chunks=lambda: [b"\0" * 30], part="p")
    with DataFile(tmp_path / "d") as data, pytest.raises(ArtifactError, match="30 bytes for .4, 4., which needs 32"):
        data.append(short)


def test_truncated_file_is_an_error(tmp_path: Path) -> None:
    with DataFile(tmp_path / "d") as data:
        entry = data.append(array("w", np.ones(100, np.float32)))
    (tmp_path / "d").write_bytes((tmp_path / "d").read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="ends inside w"):
        read_bytes(tmp_path, entry)


def test_packed_bytes() -> None:
    assert packed_bytes(TensorProto.INT4, (3, 5)) == 8 and packed_bytes(TensorProto.FLOAT16, (3, 5)) == 30
    assert packed_bytes(TensorProto.INT64, ()) == 8
