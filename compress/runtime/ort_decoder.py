"""An exported decoder run step by step with ONNX Runtime: our graphs with fixed caches, and bundles with growing ones.

What a graph returns as `present` is its next `past`. Where the folder says that both can be one buffer
(`past_present_share_buffer` of `genai_config.json`), they are: a step then writes one row of each and copies nothing.

Shapes: B sequences, T tokens, V vocabulary
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import ConfigError, UnsupportedError
from compress.runtime.ort import DTYPES, LOGITS_FROM, OnnxRunner


class OrtDecoder:
    """See `compress.runtime.runner.Decoder`."""

    runtime = "onnxruntime"

    def __init__(self, runner: OnnxRunner, *, capacity: int, batch: int = 1) -> None:
        if runner.capacity is not None and capacity > runner.capacity:
            raise ConfigError(
                f"{runner.path}: {capacity} tokens are asked for and its caches hold {runner.capacity}; ask for fewer "
                "(--max-new-tokens), or export again with a larger --context"
            )
        self.runner = runner
        self.capacity = runner.capacity or capacity
        self.batch = batch
        self.vocab_size = runner.vocab_size
        self._types = {i.name: DTYPES[i.type] for i in runner.session.get_inputs()}
        outputs = [o.name for o in runner.session.get_outputs()]
        self._presents = {past: _present(past, outputs, runner.path) for past in runner.pasts}
        self._pasts: dict[str, np.ndarray[Any, Any]] = {}
        self._binding: Any = self._bind_caches() if runner.shares_caches else None
        self._ids = torch.zeros(batch, dtype=torch.int64)
        self.length = 0

    @classmethod
    def open(cls, folder: Path, *, capacity: int, batch: int = 1) -> OrtDecoder:
        """`capacity` counts for graphs whose caches grow; one with fixed caches has its own."""
        return cls(OnnxRunner.open(folder), capacity=capacity, batch=batch)

    @property
    def bytes_a_token(self) -> int:
        """The graph's files, nearly all weights; an embedding of its own counts whole, though a step reads a row."""
        graph = self.runner.path
        files = [graph, *graph.parent.glob(f"{graph.name}*data"), *graph.parent.glob(f"{graph.stem}*.bin")]
        return sum(f.stat().st_size for f in files)

    def prefill(self, ids_BT: Tensor) -> Tensor:
        self.length = 0
        if self._binding is None:
            self._pasts = {
                name: np.zeros((self.batch, *shape), self._types[name]) for name, shape in self.runner.pasts.items()
            }
        return self._run(ids_BT)

    def step(self, ids_B: Tensor) -> Tensor:
        return self._run(ids_B[:, None])

    def advance(self) -> Tensor:
        self.step(self._ids)
        return self._ids

    def _run(self, ids_BT: Tensor) -> Tensor:
        count = ids_BT.shape[1]
        if self.length + count > self.capacity:
            raise ConfigError(
                f"{self.length + count} tokens do not fit a cache of {self.capacity}; ask for fewer new tokens or a "
                "shorter prompt"
            )
        feeds = {name: self._feed(name, ids_BT.numpy()) for name in self._types if name not in self._presents}
        if LOGITS_FROM in self.runner.optional:
            feeds[LOGITS_FROM] = np.array([count - 1])
        with self.runner.explained():
            logits = self._in_place(feeds) if self._binding is not None else self._returned(feeds)
        self.length += count
        last = torch.from_numpy(np.ascontiguousarray(logits[:, -1]))
        self._ids = last.argmax(-1)
        return last

    def _bind_caches(self) -> Any:
        """A binding whose pasts and presents are the same buffers of `capacity` tokens."""
        from onnxruntime import OrtValue

        binding = self.runner.session.io_binding()
        binding.bind_output("logits", "cpu")  # the first of its outputs
        for past, (heads, _, size) in self.runner.pasts.items():
            shape = (self.batch, heads, self.capacity, size)
            cache = OrtValue.ortvalue_from_numpy(np.zeros(shape, self._types[past]))
            binding.bind_ortvalue_input(past, cache)
            binding.bind_ortvalue_output(self._presents[past], cache)
        return binding

    def _in_place(self, feeds: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        """Logits `[B, T, V]`; rows of the caches beyond `length` are what an earlier text left, and are not read."""
        from onnxruntime import OrtValue

        binding = self._binding
        for name, value in feeds.items():  # bind_cpu_input knows no inputs that have a value
            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(value))
        binding.bind_output("logits", "cpu")
        self.runner.session.run_with_iobinding(binding)
        logits: np.ndarray[Any, Any] = binding.get_outputs()[0].numpy()
        return logits

    def _returned(self, feeds: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        """Logits `[B, T, V]`; keeps the presents as the next pasts."""
        logits, *presents = self.runner.session.run(["logits", *self._presents.values()], {**feeds, **self._pasts})
        self._pasts = dict(zip(self._presents, presents, strict=True))
        out: np.ndarray[Any, Any] = logits
        return out

    def _feed(self, name: str, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        batch, count = ids.shape
        kind = self._types[name]
        if name == "input_ids":
            return ids.astype(kind)
        if name == "attention_mask":
            return np.ones((batch, self.length + count), kind)
        if name == "write_indices":
            return np.full(batch, self.length, kind)
        if name == "logits_indices":
            return np.full((batch, 1), count - 1, kind)
        return np.tile(np.arange(self.length, self.length + count, dtype=kind), (batch, 1))  # position_ids


def _present(past: str, outputs: list[str], path: Path) -> str:
    """The output that continues a past: `present.0.key`, `present_key_values.0.key` and the like."""
    for prefix in ("past_key_values", "past"):
        for other in ("present", "present_key_values"):
            name = past.replace(prefix, other, 1)
            if past.startswith(prefix) and name in outputs:
                return name
    raise UnsupportedError(f"{path}: no output continues {past}; it has {', '.join(outputs[:4])}, ...")
