"""An exported decoder read with ONNX Runtime on the CPU: a folder with one `.onnx` graph that gives `logits`.

Takes the input names that optimum, onnxruntime-genai's builder and our exporters share: input_ids, attention_mask,
position_ids and a past (`past_key_values.N.key`, `[batch, heads, past, size]`). A past of free length starts empty; one
of fixed length is a cache of that capacity, which `write_indices` says to be empty. `logits_indices` asks for all
logits. One sequence runs at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import ArtifactError, ConfigError, UnsupportedError
from evaluators.runner import Tokens

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


_KNOWN = ("input_ids", "attention_mask", "position_ids", "write_indices", "logits_indices")


class OnnxRunner:
    """See `evaluators.runner.Runner`. `capacity` is the length of fixed caches, None without."""

    runtime = "onnxruntime"

    def __init__(self, path: Path, session: Any) -> None:
        self.path = path
        self.session = session
        logits = next(o for o in session.get_outputs() if o.name == "logits")
        if not isinstance(logits.shape[-1], int):
            raise UnsupportedError(f"{path}: the graph does not say the vocabulary's size; export it with a fixed one")
        self.vocab_size: int = logits.shape[-1]
        self.capacity = _capacity(path, session)

    @classmethod
    def open(cls, folder: Path) -> OnnxRunner:
        """Open the folder's graph. ConfigError when ONNX Runtime is missing, UnsupportedError for an unknown input."""
        try:
            import onnxruntime
        except ImportError as e:
            raise ConfigError(
                f'{folder} needs ONNX Runtime, which is not installed; pip install "compress-toolkit[onnx]"'
            ) from e
        path = find_graph(folder)
        # ONNX Runtime fuses DequantizeLinear and MatMul, and unless told otherwise then rounds activations to INT8
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        options.log_severity_level = 3  # errors; TensorScatter warns at every call that it copies
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        if "logits" not in [o.name for o in session.get_outputs()]:
            raise UnsupportedError(f"{path}: no output is called logits; only causal language models can be judged")
        for i in session.get_inputs():
            if i.name not in _KNOWN and not i.name.startswith("past_"):
                raise UnsupportedError(f"{path}: input {i.name!r} is not one of {', '.join(_KNOWN)} or a past")
            if i.type not in _DTYPES:
                raise UnsupportedError(f"{path}: input {i.name} is {i.type}; float and integer inputs are read")
        return cls(path, session)

    def read(self, sequences: Sequence[Tokens]) -> OnnxReading:
        """ConfigError when a sequence is longer than the graph's caches."""
        longest = max((len(s.ids_T) for s in sequences), default=0)
        if self.capacity is not None and longest > self.capacity:
            raise ConfigError(
                f"{self.path}: its caches hold {self.capacity} tokens and a sequence has {longest}; evaluate with "
                f"--context {self.capacity} or less (and shorter task items), or export again with a larger --context"
            )
        return OnnxReading(self, sequences)

    def logits_TV(self, ids_T: Tensor) -> Tensor:
        """Float32 `[T, V]` of one sequence."""
        length = len(ids_T)
        feeds = {i.name: _feed(i.name, i.shape, _DTYPES[i.type], ids_T) for i in self.session.get_inputs()}
        out = self.session.run(["logits"], feeds)[0][0]
        if out.shape[0] != length:
            raise UnsupportedError(
                f"{self.path}: {out.shape[0]} of {length} tokens have logits; the graph keeps the last one's only and "
                "cannot be judged on text, export it with all logits"
            )
        return torch.from_numpy(out.astype(np.float32))


def _feed(name: str, shape: Sequence[int | str], dtype: Any, ids_T: Tensor) -> np.ndarray[Any, Any]:
    """What an input of the graph gets for one sequence that starts with nothing before it."""
    length = len(ids_T)
    if name == "input_ids":
        return ids_T.numpy()[None].astype(dtype)
    if name == "attention_mask":
        return np.ones((1, length), dtype)
    if name in ("position_ids", "logits_indices"):
        return np.arange(length, dtype=dtype)[None]
    if name == "write_indices":
        return np.zeros(1, dtype)
    past = shape[2] if isinstance(shape[2], int) else 0
    return np.zeros((1, int(shape[1]), past, int(shape[3])), dtype)


def _capacity(path: Path, session: Any) -> int | None:
    """The length of caches that have a fixed one. UnsupportedError for a past of a shape that cannot be fed."""
    lengths: list[int | None] = []
    for i in session.get_inputs():
        if i.name.startswith("past_"):
            if len(i.shape) != 4 or not all(isinstance(i.shape[k], int) for k in (1, 3)):
                raise UnsupportedError(f"{path}: {i.name} has shape {i.shape}, not [batch, heads, past, size]")
            lengths.append(i.shape[2] if isinstance(i.shape[2], int) else None)
    fixed = {n for n in lengths if n is not None}
    if not fixed:
        return None
    if len(fixed) > 1 or None in lengths or "write_indices" not in [i.name for i in session.get_inputs()]:
        raise UnsupportedError(
            f"{path}: its pasts have fixed lengths {sorted(fixed)} without one capacity and write_indices for all; "
            "it cannot be told that they are empty"
        )
    return fixed.pop()


class OnnxReading:
    """Runs a sequence when its logits are asked for, and keeps the last."""

    observed = None

    def __init__(self, runner: OnnxRunner, sequences: Sequence[Tokens]) -> None:
        self.runner = runner
        self.sequences = sequences
        self._last: tuple[int, Tensor] | None = None

    def logits(self, index: int, start: int, stop: int) -> Tensor:
        if self._last is None or self._last[0] != index:
            self._last = (index, self.runner.logits_TV(self.sequences[index].ids_T))
        return self._last[1][start:stop]

    def close(self) -> None:
        self._last = None


def find_graph(folder: Path) -> Path:
    """The folder's one graph: model.onnx, or the only .onnx there."""
    graphs = sorted(folder.glob("*.onnx"))
    preferred = [g for g in graphs if g.name == "model.onnx"] or graphs
    if len(preferred) != 1:
        found = ", ".join(g.name for g in graphs) or "none"
        raise ArtifactError(f"{folder}: one .onnx graph is needed, found {found}; leave one, called model.onnx")
    return preferred[0]
