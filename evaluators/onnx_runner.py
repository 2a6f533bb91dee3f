"""An exported decoder read with ONNX Runtime on the CPU: a folder with one `.onnx` graph that gives `logits`.

Takes the input names that optimum, onnxruntime-genai's builder and our exporter share: input_ids, attention_mask,
position_ids and an empty past (`past_key_values.N.key`). One sequence runs at a time.
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


class OnnxRunner:
    """See `evaluators.runner.Runner`."""

    runtime = "onnxruntime"

    def __init__(self, path: Path, session: Any) -> None:
        self.path = path
        self.session = session
        logits = next(o for o in session.get_outputs() if o.name == "logits")
        if not isinstance(logits.shape[-1], int):
            raise UnsupportedError(f"{path}: the graph does not say the vocabulary's size; export it with a fixed one")
        self.vocab_size: int = logits.shape[-1]

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
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        if "logits" not in [o.name for o in session.get_outputs()]:
            raise UnsupportedError(f"{path}: no output is called logits; only causal language models can be judged")
        known = ("input_ids", "attention_mask", "position_ids")
        for i in session.get_inputs():
            if i.name not in known and not i.name.startswith("past_"):
                raise UnsupportedError(f"{path}: input {i.name!r} is not one of {', '.join(known)} or a past")
        return cls(path, session)

    def read(self, sequences: Sequence[Tokens]) -> OnnxReading:
        return OnnxReading(self, sequences)

    def logits_TV(self, ids_T: Tensor) -> Tensor:
        """Float32 `[T, V]` of one sequence."""
        length = len(ids_T)
        feeds = {}
        for i in self.session.get_inputs():
            dtype = _DTYPES.get(i.type)
            if dtype is None:
                raise UnsupportedError(f"{self.path}: input {i.name} is {i.type}; float and integer inputs are read")
            if i.name == "input_ids":
                feeds[i.name] = ids_T.numpy()[None].astype(dtype)
            elif i.name == "attention_mask":
                feeds[i.name] = np.ones((1, length), dtype)
            elif i.name == "position_ids":
                feeds[i.name] = np.arange(length, dtype=dtype)[None]
            else:
                if len(i.shape) != 4 or not all(isinstance(i.shape[k], int) for k in (1, 3)):
                    raise UnsupportedError(f"{self.path}: {i.name} has shape {i.shape}, not [batch, heads, past, size]")
                feeds[i.name] = np.zeros((1, i.shape[1], 0, i.shape[3]), dtype)
        out = self.session.run(["logits"], feeds)[0][0]
        if out.shape[0] != length:
            raise UnsupportedError(
                f"{self.path}: {out.shape[0]} of {length} tokens have logits; the graph keeps the last one's only and "
                "cannot be judged on text, export it with all logits"
            )
        return torch.from_numpy(out.astype(np.float32))


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
