"""An exported decoder read with ONNX Runtime on the CPU: a folder with one `.onnx` graph that gives `logits`.

Takes the input names that optimum, onnxruntime-genai's builder and our exporters share: input_ids, attention_mask,
position_ids and a past (`past_key_values.N.key`, `[batch, heads, past, size]`). A past of free length starts empty; one
of fixed length is a cache of that capacity, which `write_indices` says to be empty. `logits_indices` asks for all
logits. One sequence runs at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress import threads
from compress.errors import ArtifactError, ConfigError, UnsupportedError, explained
from compress.files import check_file, read_json
from compress.folders import check_members
from compress.runtime.runner import Span, Tokens

DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


LOGITS_FROM = "logits_from"  # an input with a value: the first position that our graphs give logits of
_KNOWN = ("input_ids", "attention_mask", "position_ids", "write_indices", "logits_indices")


def open_session(path: Path) -> Any:
    """An ONNX Runtime session of a graph file on the CPU, computing what the graph says.

    ONNX Runtime fuses DequantizeLinear and MatMul, and unless told otherwise then rounds activations to INT8, which is
    another model (0.6 % off); accuracy level 0 keeps them. ConfigError when ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as e:
        raise ConfigError(
            f'{path} needs ONNX Runtime, which is not installed; pip install "compress-toolkit[onnx]"'
        ) from e
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    threads.calm(options)
    options.log_severity_level = 3  # errors; TensorScatter warns at every call that it copies
    with explained(f"{path}: ONNX Runtime cannot open the graph", "export it again"):
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class OnnxRunner:
    """See `compress.runtime.runner.Runner`. `capacity` is the length of fixed caches, None without.

    shares_caches: a past of any length may be a buffer that is also its present. optional: inputs that have a value.
    """

    runtime = "onnxruntime"

    def __init__(self, path: Path, session: Any) -> None:
        self.path = path
        self.session = session
        logits = next(o for o in session.get_outputs() if o.name == "logits")
        if not isinstance(logits.shape[-1], int):
            raise UnsupportedError(f"{path}: the graph does not say the vocabulary's size; export it with a fixed one")
        self.vocab_size: int = logits.shape[-1]
        self.pasts = _pasts(path, session)
        self.capacity = _capacity(path, self.pasts, session)
        self.optional = {i.name for i in session.get_overridable_initializers()}
        search = _genai_config(path).get("search", {})
        self.shares_caches = self.capacity is None and bool(search.get("past_present_share_buffer"))

    @classmethod
    def open(cls, folder: Path) -> OnnxRunner:
        """Open the folder's graph. ConfigError when ONNX Runtime is missing, UnsupportedError for an unknown input."""
        check_members(folder)
        path = find_graph(folder)
        session = open_session(path)
        if "logits" not in [o.name for o in session.get_outputs()]:
            raise UnsupportedError(f"{path}: no output is called logits; only causal language models can be judged")
        for i in session.get_inputs():
            if i.name not in _KNOWN and not i.name.startswith("past_"):
                raise UnsupportedError(f"{path}: input {i.name!r} is not one of {', '.join(_KNOWN)} or a past")
            if i.type not in DTYPES:
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

    def explained(self) -> AbstractContextManager[None]:
        """What ONNX Runtime raises in here is said of the graph."""
        return explained(f"{self.path}: ONNX Runtime cannot run the graph", "export it again")

    def logits_TV(self, ids_T: Tensor) -> Tensor:
        """Float32 `[T, V]` of one sequence."""
        length = len(ids_T)
        with self.explained():
            feeds = {
                i.name: np.zeros((1, *self.pasts[i.name]), DTYPES[i.type])
                if i.name in self.pasts
                else _feed(i.name, DTYPES[i.type], ids_T)
                for i in self.session.get_inputs()
            }
            out = self.session.run(["logits"], feeds)[0][0]
        if out.shape[0] != length:
            raise UnsupportedError(
                f"{self.path}: {out.shape[0]} of {length} tokens have logits; the graph keeps the last one's only and "
                "cannot be judged on text, export it with all logits"
            )
        return torch.from_numpy(out.astype(np.float32))


def _feed(name: str, dtype: Any, ids_T: Tensor) -> np.ndarray[Any, Any]:
    """What an input of the graph that is no past gets, for one sequence that starts with nothing before it."""
    if name == "input_ids":
        return ids_T.numpy()[None].astype(dtype)
    if name == "attention_mask":
        return np.ones((1, len(ids_T)), dtype)
    if name == "write_indices":
        return np.zeros(1, dtype)
    return np.arange(len(ids_T), dtype=dtype)[None]  # position_ids, logits_indices


def _pasts(path: Path, session: Any) -> dict[str, tuple[int, int, int]]:
    """Heads, length and size of each past, by name; a free length is 0.

    onnxruntime-genai names the size of a head instead of giving it; `genai_config.json` beside the graph has it.
    UnsupportedError for a past of a shape that cannot be fed.
    """
    decoder = _genai_config(path).get("model", {}).get("decoder", {})
    pasts = {}
    for i in session.get_inputs():
        if not i.name.startswith("past_"):
            continue
        if len(i.shape) == 4:
            _, heads, length, size = i.shape
            heads = heads if isinstance(heads, int) else decoder.get("num_key_value_heads")
            size = size if isinstance(size, int) else decoder.get("head_size")
        if len(i.shape) != 4 or not isinstance(heads, int) or not isinstance(size, int):
            raise UnsupportedError(
                f"{path}: {i.name} has shape {i.shape}, not [batch, heads, past, size] with heads and size given there "
                "or in genai_config.json"
            )
        pasts[i.name] = (heads, length if isinstance(length, int) else 0, size)
    return pasts


def _genai_config(path: Path) -> dict[str, Any]:
    """What onnxruntime-genai reads beside a graph; empty without."""
    config = path.parent / "genai_config.json"
    return read_json(config) if config.exists() else {}


def _capacity(path: Path, pasts: Mapping[str, tuple[int, int, int]], session: Any) -> int | None:
    """The length of caches that have a fixed one. UnsupportedError when it cannot be told that they are empty."""
    lengths = {length for _, length, _ in pasts.values()}
    if lengths <= {0}:
        return None
    if len(lengths) > 1 or "write_indices" not in [i.name for i in session.get_inputs()]:
        raise UnsupportedError(
            f"{path}: its pasts have lengths {sorted(lengths)} without one capacity and write_indices for all; "
            "it cannot be told that they are empty"
        )
    return lengths.pop()


class OnnxReading:
    """Runs a sequence when its logits are asked for; keeps the last, and what was asked for last."""

    def __init__(self, runner: OnnxRunner, sequences: Sequence[Tokens]) -> None:
        self.runner = runner
        self.sequences = sequences
        self.observed: None = None
        self._last: tuple[int, Tensor] | None = None
        self._asked: tuple[Sequence[Span], Tensor] | None = None

    @property
    def vocab_size(self) -> int:
        return self.runner.vocab_size

    @property
    def ids_at_once(self) -> int:
        return self.runner.vocab_size

    def at(self, spans: Sequence[Span], ids: range) -> Tensor:
        if self._asked is None or self._asked[0] != spans:
            self._asked = (list(spans), torch.cat([self.logits(*span) for span in spans]))
        return self._asked[1][:, ids.start : ids.stop]

    def logits(self, index: int, start: int, stop: int) -> Tensor:
        if self._last is None or self._last[0] != index:
            self._last = (index, self.runner.logits_TV(self.sequences[index].ids_T))
        return self._last[1][start:stop]

    def close(self) -> None:
        self._last = self._asked = None


def find_graph(folder: Path) -> Path:
    """The folder's one graph: model.onnx, or the only .onnx there."""
    graphs = sorted(folder.glob("*.onnx"))
    preferred = [g for g in graphs if g.name == "model.onnx"] or graphs
    if len(preferred) != 1:
        found = ", ".join(g.name for g in graphs) or "none"
        raise ArtifactError(f"{folder}: one .onnx graph is needed, found {found}; leave one, called model.onnx")
    check_file(preferred[0])
    return preferred[0]
