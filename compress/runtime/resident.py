"""A model folder held in memory whole and run with transformers' own forward and cache: any architecture and device.

Weights are dense in `dtype`, activation quantizers as the folder's plan says. What is quick lies elsewhere
(`gpu_decoder`, `ort_decoder`); this one is the reference that always works.

Shapes: B sequences, T tokens, V vocabulary
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import ConfigError
from compress.kv_cache import growing_cache
from compress.model import StreamedModel


class TorchDecoder:
    """See `compress.runtime.runner.Decoder`."""

    runtime = "torch"

    def __init__(self, model: StreamedModel, *, capacity: int, batch: int = 1) -> None:
        positions = getattr(model.model.config, "max_position_embeddings", None)
        if positions is not None and capacity > positions:
            raise ConfigError(
                f"{model.checkpoint.path}: {capacity} tokens are asked for and the model was made for {positions}; "
                "ask for a shorter prompt or fewer new tokens"
            )
        model.load_whole()
        self.model = model
        self.capacity = capacity
        self.batch = batch
        self.length = 0
        self._cache: Any = None
        self._ids = torch.zeros(batch, dtype=torch.int64)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        capacity: int,
        batch: int = 1,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> TorchDecoder:
        return cls(StreamedModel.open(folder, device=device, dtype=dtype), capacity=capacity, batch=batch)

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def bytes_a_token(self) -> int:
        """Every parameter in its dtype but an input embedding of its own, of which a step reads one row."""
        base: Any = self.model.base
        head: Any = self.model.model.get_output_embeddings()  # type: ignore[operator]
        embedding = base.get_input_embeddings().weight
        total = sum(p.numel() * p.element_size() for p in self.model.model.parameters())
        return total - (0 if head is None else embedding.numel() * embedding.element_size())

    @torch.no_grad()
    def prefill(self, ids_BT: Tensor) -> Tensor:
        self._cache = growing_cache(self.model.kv, self.model.model.config)
        self.length = 0
        return self._forward(ids_BT)

    @torch.no_grad()
    def step(self, ids_B: Tensor) -> Tensor:
        return self._forward(ids_B[:, None])

    def advance(self) -> Tensor:
        self.step(self._ids)
        return self._ids

    def _forward(self, ids_BT: Tensor) -> Tensor:
        count = ids_BT.shape[1]
        if self.length + count > self.capacity:
            raise ConfigError(
                f"{self.length + count} tokens do not fit a cache of {self.capacity}; ask for fewer new tokens or a "
                "shorter prompt"
            )
        out = self.model.model(
            input_ids=ids_BT.to(self.model.device), past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self.length += count
        logits: Tensor = out.logits[:, -1]
        self._ids = logits.argmax(-1)
        return logits
