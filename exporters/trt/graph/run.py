"""A written graph on ONNX Runtime's CPU provider: prefill, then one token at a time through the caches.

Shapes: T tokens, V vocabulary
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

VERSIONS = ("onnx", "onnxruntime")
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def versions() -> dict[str, str]:
    """Of the packages that write and run a graph; not from metadata, because onnxruntime has several distributions."""
    return {name: str(importlib.import_module(name).__version__) for name in VERSIONS}


def logits_TV(session: Any, ids_T: Tensor, prefill: int) -> Tensor:
    """Float32 `[T, V]`: the first `prefill` tokens enter in one call, each further one in a call of its own."""
    inputs = {i.name: i for i in session.get_inputs()}
    caches = {
        name: np.zeros([1, *i.shape[1:]], _DTYPES[i.type])
        for name, i in inputs.items()
        if name.startswith("past_key_values.")
    }
    names = ["logits", *(name.replace("past_key_values.", "present.") for name in caches)]
    found = []
    ids = ids_T.numpy()[None]
    for start, stop in [(0, prefill), *((t, t + 1) for t in range(prefill, len(ids_T)))]:
        feeds = {
            "input_ids": ids[:, start:stop],
            "write_indices": np.array([start], dtype=np.int64),
            "logits_indices": np.arange(stop - start, dtype=np.int64)[None],
            **caches,
        }
        logits, *presents = session.run(names, feeds)
        caches = dict(zip(caches, presents, strict=True))
        found.append(logits[0].astype(np.float32))
    return torch.from_numpy(np.concatenate(found))
