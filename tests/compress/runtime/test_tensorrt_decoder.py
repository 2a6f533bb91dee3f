"""The decoder's own part (pieces, positions, addresses, shapes, caches) over a stand-in for TensorRT's Python API.

The stand-in runs the graph that an engine is built from with ONNX Runtime, and reads and writes the addresses that it
was given, as TensorRT does. What only a GPU shows (the engine, streams, CUDA Graphs) is in `tests/gpu`.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from compress.errors import ArtifactError, ConfigError
from compress.runtime.engine_stamp import Stamp
from compress.runtime.ort import open_session
from compress.runtime.resident import TorchDecoder
from compress.runtime.tensorrt_decoder import TensorrtDecoder
from compress.tell import Heard

pytest.importorskip("onnxruntime")
TYPES = {"tensor(int64)": np.int64, "tensor(float16)": np.float16}
TRT = SimpleNamespace(
    __name__="standin", __version__="1", ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="ours")
)
SPREAD = 6


class Context:
    """An execution context: refuses what is outside its profile, computes what its addresses hold."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.profile = engine, -1
        self.address: dict[str, int] = {}
        self.shape: dict[str, tuple[int, ...]] = {}
        self.memory = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.get_device_memory_size_for_profile_v2(self.profile)
        self.memory = address

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.address[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        limits = list(self.engine.shapes.values())[self.profile][name]
        self.shape[name] = shape
        return all(a <= n <= b for a, n, b in zip(limits["min"], shape, limits["max"], strict=True))

    def execute_async_v3(self, stream: int) -> bool:
        assert self.memory and self.memory == self.engine.contexts[0].memory, "both contexts share one block"
        session = self.engine.session
        feeds = {
            i.name: np.frombuffer(
                (ctypes.c_char * (math.prod(self.shape[i.name]) * np.dtype(TYPES[i.type]).itemsize)).from_address(
                    self.address[i.name]
                ),
                TYPES[i.type],
            )
            .reshape(self.shape[i.name])
            .copy()
            for i in session.get_inputs()
        }
        names = [o.name for o in session.get_outputs()]
        for name, value in zip(names, session.run(names, feeds), strict=True):
            data = np.ascontiguousarray(value).tobytes()
            ctypes.memmove(self.address[name], data, len(data))
        return True


class Engine:
    def __init__(self, graph: Path, shapes: dict[str, Any]) -> None:
        self.session = open_session(graph)
        self.shapes = shapes
        self.contexts: list[Context] = []
        self.tensors = {t.name: t for t in [*self.session.get_inputs(), *self.session.get_outputs()]}
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = len(shapes)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_shape(self, name: str) -> list[Any]:
        return list(self.tensors[name].shape)

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name={"tensor(float16)": "HALF", "tensor(int64)": "INT64"}[self.tensors[name].type])

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return 1000 * (2 - index)

    def create_execution_context(self, strategy: str) -> Context:
        assert strategy == "ours"
        self.contexts.append(Context(self))
        return self.contexts[-1]


@pytest.fixture(scope="module")
def graphs(reference_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The reference model's graph and build.json by dialect: at most `SPREAD` tokens a call, two sequences."""
    from compress.model import StreamedModel
    from exporters.trt.graph import architecture, engine
    from exporters.trt.graph.write import write_graph

    made = {}
    for opset in (24, 21):
        folder = tmp_path_factory.mktemp(f"opset{opset}")
        write_graph(reference_model, folder, opset=opset, capacity=48)
        arch = architecture.read(StreamedModel.open(reference_model))
        plan = engine.plan(arch, context=48, batch=2, opset=opset, quantized={4: [], 8: []})
        for name in ("prefill", "any"):
            plan["profiles"][name]["input_ids"]["max"] = [2, SPREAD]
        made[opset] = folder, plan
    return made


def opened(made: Any, opset: int, profiles: list[str], **options: Any) -> tuple[TensorrtDecoder, Engine]:
    folder, plan = made[opset]
    shapes = {name: plan["profiles"][name] for name in profiles}
    stamp = Stamp(
        folder=folder, library="standin", version="1", sm="8.0", capacity=plan["capacity"], profiles=tuple(profiles),
        shapes=shapes, caches=plan["caches"], caches_in_place=plan["caches_in_place"], engine_bytes=0, weight_bytes=5,
    )  # fmt: skip
    engine = Engine(folder / "model.onnx", shapes)
    return TensorrtDecoder(stamp, TRT, engine, batch=2, device="cpu", **options), engine


@pytest.mark.parametrize(
    ("opset", "profiles"), [(24, ["prefill", "decode"]), (24, ["any"]), (21, ["prefill", "decode"])]
)
def test_it_computes_the_model(opset: int, profiles: list[str], graphs: Any, reference_model: Path) -> None:
    """Prompts of one piece, of several and of a ragged last one; two prompts one after the other."""
    decoder, engine = opened(graphs, opset, profiles, graphs=False)
    wanted = TorchDecoder.open(reference_model, capacity=48, batch=2)
    assert decoder.vocab_size == wanted.vocab_size and decoder.bytes_a_token == 5
    for length in (3, SPREAD, 2 * SPREAD + 1):
        prompt = torch.arange(2 * length).reshape(2, length) * 37 % 4000
        found, want = decoder.prefill(prompt).float(), wanted.prefill(prompt)
        assert float((found - want).norm() / want.norm()) < 5e-3
        for step in range(4):
            ids = torch.tensor([5 + step, 900 - step])
            found, want = decoder.step(ids).float(), wanted.step(ids)
            assert float((found - want).norm() / want.norm()) < 5e-3, step
        assert torch.equal(decoder.advance(), wanted.advance())
    assert [c.profile for c in engine.contexts] == ([0, 1] if len(profiles) == 2 else [0, 0])
    assert decoder.block.numel() == 2000  # what the larger profile needs, and not the sum
    assert decoder.cache_bytes_a_token == 6 * 2 * 2 * 64 * 2


def test_what_does_not_fit_is_one_sentence(graphs: Any) -> None:
    decoder, _ = opened(graphs, 24, ["prefill", "decode"], graphs=False)
    with pytest.raises(ConfigError, match="2 prompts of 49 tokens, and it was opened for 2 of at most 48"):
        decoder.prefill(torch.zeros(2, 49, dtype=torch.int64))
    decoder.prefill(torch.ones(2, 47, dtype=torch.int64))
    decoder.advance()
    with pytest.raises(ConfigError, match="49 tokens do not fit a cache of 48"):
        decoder.advance()


def test_what_the_library_refuses_is_one_sentence(graphs: Any) -> None:
    decoder, engine = opened(graphs, 24, ["prefill", "decode"], graphs=False)
    short = {**engine.shapes["prefill"], "input_ids": {"min": [1, 1], "max": [2, 2]}}
    engine.shapes = {**engine.shapes, "prefill": short}
    with pytest.raises(ArtifactError, match=r"standin 1 refused the shape \[2, 3\] of input_ids"):
        decoder.prefill(torch.ones(2, 3, dtype=torch.int64))


def test_an_engine_with_other_tensors_is_refused(graphs: Any) -> None:
    decoder, engine = opened(graphs, 24, ["any"], graphs=False)
    engine.tensors["scores"] = engine.tensors.pop("logits")
    with pytest.raises(ArtifactError, match="tensors of one only: logits, scores"):
        TensorrtDecoder(decoder.stamp, TRT, engine, batch=2, device="cpu")


def test_a_graph_that_cannot_be_is_said(graphs: Any) -> None:
    heard = Heard()
    decoder, _ = opened(graphs, 21, ["any"], graphs=True, tell=heard)
    assert not decoder.graphs and heard.notes == [
        "no CUDA graph, steps are launched one by one: this engine (opset 21) does not update its caches in place"
    ]


def test_names_of_the_real_library() -> None:
    """Every name that the decoder calls, in NVIDIA's bindings; loading an engine needs a GPU."""
    trt: Any = pytest.importorskip("tensorrt_rtx", reason="TENSORRT-RTX ABSENT: pip install '.[tensorrt-rtx]'")
    used = {
        trt.ICudaEngine: "num_io_tensors num_optimization_profiles create_execution_context create_runtime_config "
        "get_tensor_name get_tensor_shape get_tensor_dtype get_device_memory_size_for_profile_v2",
        trt.IExecutionContext: "execute_async_v3 is_stream_capturable set_device_memory set_input_shape "
        "set_optimization_profile_async set_tensor_address",
        trt.IRuntimeConfig: "dynamic_shapes_kernel_specialization_strategy set_execution_context_allocation_strategy",
        trt.DynamicShapesKernelSpecializationStrategy: "EAGER",
        trt.ExecutionContextAllocationStrategy: "USER_MANAGED",
        trt.Runtime: "deserialize_cuda_engine",
    }
    assert [(kind, name) for kind, names in used.items() for name in names.split() if not hasattr(kind, name)] == []
    assert {trt.DataType.HALF.name, trt.DataType.FLOAT.name, trt.DataType.BF16.name} == {"HALF", "FLOAT", "BF16"}
