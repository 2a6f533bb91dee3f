"""A TensorRT engine of our graph, run step by step: one execution context a profile, one block of memory for both.

The two never run at the same time, so the block is as large as the larger of them needs. Caches keep their addresses;
a decode step (engine, greedy pick, next position) is captured once in a CUDA graph and replayed. What is refused, and
how a prompt is cut, is decided in `engine_stamp`. Not run on a GPU yet: `tests/gpu/test_tensorrt_on_gpu.py` does that.

Shapes: B sequences, T tokens, V vocabulary
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import ArtifactError, ConfigError
from compress.runtime import engine_stamp
from compress.runtime.cuda_graph import CudaGraph
from compress.runtime.engine_stamp import Role, Stamp
from compress.tell import SILENT, Tell

_TYPES = {"HALF": torch.float16, "FLOAT": torch.float32, "BF16": torch.bfloat16}
_INPUTS = ("input_ids", "write_indices", "logits_indices")


class TensorrtDecoder:
    """See `compress.runtime.runner.Decoder`. `trt` and `engine`: the library's module, and what it deserialized."""

    def __init__(
        self,
        stamp: Stamp,
        trt: Any,
        engine: Any,
        *,
        batch: int = 1,
        graphs: bool = True,
        device: str = "cuda",
        tell: Tell = SILENT,
    ) -> None:
        self.stamp = stamp
        self.runtime = stamp.package
        self.capacity = stamp.capacity
        self.batch = batch
        self.tell = tell
        self.graph: CudaGraph | None = None
        self.graphs = graphs
        self.length = 0
        self._cuda = device.startswith("cuda")
        self._own = torch.cuda.Stream() if self._cuda else None
        _check_names(stamp, engine)

        def buffer(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.vocab_size = int(engine.get_tensor_shape("logits")[-1])
        self.prompt = buffer(batch * stamp.longest)
        self.ids_B = buffer(batch)
        self.best_B = buffer(batch)
        self.position_B = buffer(batch)
        self.last_B = buffer(batch)  # of a prompt's piece, the token to predict after
        self.first_B = buffer(batch)  # of a step, the only one
        self.logits_BV = buffer(batch, self.vocab_size, dtype=_type(engine, "logits"))
        shapes = stamp.shapes[stamp.profiles[0]]
        self.caches = {
            name: buffer(batch, *shapes[name]["max"][1:], dtype=_type(engine, name)) for name in stamp.caches
        }
        # an engine that does not update in place writes into a second set, and the two change places after every call
        self.others = self.caches if stamp.caches_in_place else {n: c.clone() for n, c in self.caches.items()}
        if graphs and not stamp.caches_in_place:
            self._without_graph("this engine (opset 21) does not update its caches in place")
        with self._stream() as stream:
            roles: tuple[Role, Role] = ("prefill", "decode")
            self.contexts = {role: _context(trt, engine, stamp.profile(role), stream) for role in roles}
        sizes = [engine.get_device_memory_size_for_profile_v2(stamp.profile(role)) for role in roles]
        self.block = buffer(max(1, *sizes), dtype=torch.uint8)
        for role in roles:
            self.contexts[role].set_device_memory(self.block.data_ptr(), self.block.numel())
            self._bind(role)
        self._shape("decode", 1)

    @classmethod
    def open(
        cls, folder: Path, *, capacity: int, batch: int = 1, graphs: bool = True, tell: Tell = SILENT
    ) -> TensorrtDecoder:
        """The folder's engine, with the capacity that it has. ConfigError where it was built for something else."""
        stamp = engine_stamp.read(folder)
        stamp.refuse_request(capacity, batch)
        has_gpu = torch.cuda.is_available()
        sm = "{}.{}".format(*torch.cuda.get_device_capability()) if has_gpu else None
        try:
            trt: Any = importlib.import_module(stamp.library)
        except ImportError:
            trt = None
        stamp.refuse_elsewhere(sm, None if trt is None else str(trt.__version__))
        engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(
            (folder / engine_stamp.ENGINE).read_bytes()
        )
        if engine is None:
            raise ArtifactError(
                f"{folder / engine_stamp.ENGINE}: {stamp.library} {stamp.version} cannot load it, for the reason that "
                "it printed above; export it again"
            )
        return cls(stamp, trt, engine, batch=batch, graphs=graphs, tell=tell)

    @property
    def bytes_a_token(self) -> int:
        """The graph's weights; an embedding of its own counts whole, though a step reads a row."""
        return self.stamp.weight_bytes

    @property
    def cache_bytes_a_token(self) -> int:
        """Keys and values of one token of one sequence."""
        return sum(c[0, :, 0].numel() * c.element_size() for c in self.caches.values())

    # ---- calls ---------------------------------------------------------------------------------------

    def prefill(self, ids_BT: Tensor) -> Tensor:
        """Logits `[B, V]` after the prompts, which enter in pieces of the profile's length."""
        batch, length = ids_BT.shape
        if batch != self.batch or length > self.capacity:
            raise ConfigError(
                f"{self.stamp.folder}: {batch} prompts of {length} tokens, and it was opened for {self.batch} of at "
                f"most {self.capacity}; pass shorter ones, or open it for that batch"
            )
        with self._stream() as stream:
            for start, stop in self.stamp.pieces(length):
                count = stop - start
                self.prompt[: batch * count].view(batch, count).copy_(ids_BT[:, start:stop])
                self.position_B.fill_(start)
                self.last_B.fill_(count - 1)
                self._shape("prefill", count)
                self._enqueue("prefill", stream)
            self.position_B.fill_(length)
            torch.argmax(self.logits_BV, -1, out=self.ids_B)
        self.length = length
        return self.logits_BV

    def step(self, ids_B: Tensor) -> Tensor:
        """Logits `[B, V]` (a buffer, overwritten by the next step) after one more token each."""
        with self._stream():
            self.ids_B.copy_(ids_B)
            self._run()
        return self.logits_BV

    def advance(self) -> Tensor:
        with self._stream():
            self._run()
        return self.ids_B

    def _run(self) -> None:
        if self.length >= self.capacity:
            raise ConfigError(
                f"{self.length + 1} tokens do not fit a cache of {self.capacity}; ask for fewer new tokens or a "
                "shorter prompt"
            )
        if self.graphs and self.graph is None:
            self._capture()
        if self.graph is not None:
            self.graph.replay()
        else:
            self._step()
        self.length += 1

    def _step(self) -> None:
        """Logits after `ids_B` at `position_B`; the greedy next ids and positions take their place."""
        self._enqueue("decode", torch.cuda.current_stream().cuda_stream if self._cuda else 0)
        torch.argmax(self.logits_BV, -1, out=self.best_B)
        self.ids_B.copy_(self.best_B)
        self.position_B.add_(1)

    def _capture(self) -> None:
        """One graph of `_step`; where the engine cannot be captured, that is said and steps are launched one by one."""
        ids, position = self.ids_B.clone(), self.position_B.clone()

        def restore() -> None:
            self.ids_B.copy_(ids)
            self.position_B.copy_(position)

        asks = getattr(self.contexts["decode"], "is_stream_capturable", None)
        if asks is not None and not asks(torch.cuda.current_stream().cuda_stream):
            return self._without_graph("the engine says that it cannot be captured")
        try:
            self.graph = CudaGraph(self._step, restore=restore)
        except RuntimeError as e:
            restore()
            self._without_graph(str(e).splitlines()[0])

    def _without_graph(self, why: str) -> None:
        self.graphs = False
        self.tell.note(f"no CUDA graph, steps are launched one by one: {why}")

    # ---- TensorRT ------------------------------------------------------------------------------------

    @contextmanager
    def _stream(self) -> Iterator[int]:
        """Work inside runs on a stream of our own (TensorRT synchronises on the default one), in order with others."""
        if self._own is None:
            yield 0
            return
        self._own.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._own):
            yield self._own.cuda_stream
        torch.cuda.current_stream().wait_stream(self._own)

    def _bind(self, role: Role) -> None:
        """Tell a context where everything lies."""
        ids, last = (self.prompt, self.last_B) if role == "prefill" else (self.ids_B, self.first_B)
        tensors = {"input_ids": ids, "write_indices": self.position_B, "logits_indices": last, "logits": self.logits_BV}
        for past, present in self.stamp.caches.items():
            tensors |= {past: self.caches[past], present: self.others[past]}
        for name, tensor in tensors.items():
            self._must(self.contexts[role].set_tensor_address(name, tensor.data_ptr()), f"the address of {name}")

    def _shape(self, role: Role, count: int) -> None:
        shapes = {"input_ids": (self.batch, count), "write_indices": (self.batch,), "logits_indices": (self.batch, 1)}
        shapes |= {name: tuple(cache.shape) for name, cache in self.caches.items()}
        for name, shape in shapes.items():
            self._must(self.contexts[role].set_input_shape(name, shape), f"the shape {list(shape)} of {name}")

    def _enqueue(self, role: Role, stream: int) -> None:
        self._must(self.contexts[role].execute_async_v3(stream), f"a call of its {role} profile")
        if self.others is not self.caches:
            self.caches, self.others = self.others, self.caches
            for each in self.contexts:
                self._bind(each)

    def _must(self, done: bool, what: str) -> None:
        if not done:
            raise ArtifactError(
                f"{self.stamp.folder}: {self.stamp.library} {self.stamp.version} refused {what}, for the reason that "
                "it printed above; export it again"
            )


def _check_names(stamp: Stamp, engine: Any) -> None:
    """The engine's inputs and outputs are those of the stamp, and its profiles as many."""
    found = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
    wanted = {*_INPUTS, "logits", *stamp.caches, *stamp.caches.values()}
    if found != wanted or engine.num_optimization_profiles != len(stamp.profiles):
        odd = sorted(found ^ wanted)
        raise ArtifactError(
            f"{stamp.folder}: the engine has {engine.num_optimization_profiles} profiles and its stamp "
            f"{len(stamp.profiles)}, tensors of one only: {', '.join(odd) or 'none'}; export it again"
        )


def _type(engine: Any, name: str) -> torch.dtype:
    return _TYPES[engine.get_tensor_dtype(name).name]


def _context(trt: Any, engine: Any, profile: int, stream: int) -> Any:
    """A context on a profile of its own, whose memory we bring."""
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    kernels = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
    if kernels is None:
        context = engine.create_execution_context(strategy)
    else:  # TensorRT-RTX: kernels for a shape are ready when it is first run, so that a graph captures the final ones
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.dynamic_shapes_kernel_specialization_strategy = kernels.EAGER
        context = engine.create_execution_context(config)
    if context is None or not context.set_optimization_profile_async(profile, stream):
        raise ArtifactError(f"{trt.__name__} {trt.__version__} makes no context for profile {profile}; export it again")
    return context
