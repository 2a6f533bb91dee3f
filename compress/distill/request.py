"""What `compress distill` is asked for, and what it made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compress.distill.data import Mix
from compress.distill.student import Goal
from compress.losses.in_blocks import Objective
from compress.workspace import Source

LOSSES = ("forward-kl", "reverse-kl", "jsd", "cross-entropy")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class DistillRequest:
    """Everything that decides the artifact, and what does not (the last group).

    tokens: to train on, None for all of the text; epochs: how often each is read. batch: rows of an update over all
    processes. micro_batch: rows of a pass, None for the largest that the pass limit allows. rate: peak learning rate.
    ce, hidden: weights beside the divergence. on_policy: share of updates on text that the student writes. scheme:
    `w4a16` and the like, of a quantized student whose codes are trained (see `qad`). compress_gradients: see
    `EngineOptions`.
    """

    teacher: Source
    student: Source
    out: Path
    data: Mix
    tokens: int | None = None
    epochs: int = 1
    seq_len: int = 512
    batch: int = 32
    micro_batch: int | None = None
    loss: str = "forward-kl"
    temperature: float = 1.0
    beta: float = 0.5
    ce: float = 0.0
    hidden: float = 0.0
    rate: float = 3e-4
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    isolate: bool = False
    cache: Path | None = None
    on_policy: float = 0.0
    lora: int | None = None
    scheme: str | None = None
    watch: str | None = None
    watch_tokens: int = 32_768
    watch_every: int | None = None
    patience: int = 3
    seed: int = 0
    dtype: str = "float32"
    teacher_dtype: str = "auto"
    engine: str = "auto"
    compress_gradients: int | str | None = None
    checkpointing: bool = False
    compile: bool = False

    device: str = "cpu"
    checkpoint_minutes: float = 10.0
    checkpoint_steps: int = 0
    force: bool = False
    resume: bool = True
    trust_remote_code: bool = False

    def options(self) -> dict[str, Any]:
        """What the manifest records and a resumed run must repeat."""
        names = (
            "tokens", "epochs", "seq_len", "batch", "micro_batch", "loss", "temperature", "beta", "ce", "hidden",
            "rate", "warmup", "weight_decay", "clip", "isolate", "on_policy", "lora", "scheme", "watch", "watch_tokens",
            "watch_every", "patience", "seed", "dtype", "teacher_dtype", "engine", "compress_gradients",
            "checkpointing", "compile",
        )  # fmt: skip
        return {
            "data": list(self.data.sources),
            "mix": list(self.data.weights),
            **{name: getattr(self, name) for name in names},
            "cache": self.cache is not None,
            "device": torch.device(self.device).type,
        }

    @property
    def needs_teacher(self) -> bool:
        return self.loss != "cross-entropy"

    @property
    def goal(self) -> Goal:
        objective = Objective(kind=self.loss, temperature=self.temperature, beta=self.beta)
        if not self.needs_teacher:
            return Goal(objective=None, ce=self.ce or 1.0)
        return Goal(objective=objective, ce=self.ce, hidden=self.hidden)


@dataclass(frozen=True, kw_only=True)
class DistillOutcome:
    """What was made: the folder, its record in the manifest, how many tensors were verified, notes for the user."""

    out: Path
    record: dict[str, Any]
    verified: int
    notes: list[str] = field(default_factory=list)
