"""Where a model's logits come from, kept apart from the logits themselves: last hidden states and an output matrix.

`head_of` reads a transformers model's head, and `proven_head` compares what it gives with what the model gives.

Shapes: P tokens (positions), V vocabulary, H hidden size, K entries of a sparse teacher
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.errors import UnsupportedError

PROBE_TOKENS = 12


@dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    """From a model's last hidden state to its logits: `z = scale * (W h + b)`, then `cap * tanh(z / cap)` if capped."""

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden_PH: Tensor, columns: slice = slice(None)) -> Tensor:
        """Logits `[P, columns]` in float32 (float64 of float64 hidden states), computed in the dtype of `hidden_PH`."""
        z_PV = product(hidden_PH, self.weight_VH[columns].to(hidden_PH.dtype).t())
        if self.bias_V is not None:
            z_PV += self.bias_V[columns]
        if self.scale != 1:
            z_PV *= self.scale
        return z_PV if self.cap is None else z_PV.div_(self.cap).tanh_().mul_(self.cap)

    def through(self, grad_PV: Tensor, logits_PV: Tensor) -> Tensor:
        """The gradient with respect to `W h + b`, from that with respect to the logits."""
        return through(grad_PV, logits_PV, self.scale, self.cap)


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseTeacher:
    """The teacher's last hidden states `[P, H]` and its head, whose vocabulary may be padded further."""

    hidden_PH: Tensor
    head: Head

    @property
    def vocabulary(self) -> int:
        return int(self.head.weight_VH.shape[0])

    def rows(self, rows: slice) -> DenseTeacher:
        return DenseTeacher(hidden_PH=self.hidden_PH[rows], head=self.head)


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseTeacher:
    """An estimate of the teacher's distribution: tokens `ids_PK` (int64) have mass `mass_PK` (float32), 1 a row.

    A token may occur several times. entropy_P: of the distribution that the estimate stands for, in nats. vocabulary:
    how many ids that distribution is over.
    """

    ids_PK: Tensor
    mass_PK: Tensor
    entropy_P: Tensor
    vocabulary: int

    def rows(self, rows: slice) -> SparseTeacher:
        return SparseTeacher(
            ids_PK=self.ids_PK[rows],
            mass_PK=self.mass_PK[rows],
            entropy_P=self.entropy_P[rows],
            vocabulary=self.vocabulary,
        )

    def within(self, columns: slice) -> tuple[Tensor, Tensor]:
        """For a block of the vocabulary: index in the block `[P, K]`, and the mass there, zero for tokens outside."""
        inside = (self.ids_PK >= columns.start) & (self.ids_PK < columns.stop)
        index_PK = (self.ids_PK - columns.start).clamp(0, columns.stop - columns.start - 1)
        return index_PK, self.mass_PK * inside


Teacher = DenseTeacher | SparseTeacher


def through(grad_PV: Tensor, logits_PV: Tensor, scale: float, cap: float | None) -> Tensor:
    """See `Head.through`."""
    if cap is not None:
        grad_PV = grad_PV * (1 - (logits_PV / cap).square())
    return grad_PV if scale == 1 else grad_PV * scale


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` with a wide result: a 16-bit one would round logits of 20 to sixteenths."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        out: Tensor = torch.mm(a, b, out_dtype=torch.float32)
        return out
    return a.float() @ b.float()


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def output_layer(model: nn.Module, path: Path) -> nn.Linear:
    """The linear that gives the logits of the transformers model that was loaded from `path`."""
    layer = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(layer, nn.Linear):
        raise UnsupportedError(
            f"{path}: {type(model).__name__} has no linear output layer, from whose inputs the losses are computed; "
            "choose another model"
        )
    return layer


def head_of(model: nn.Module, path: Path) -> Head:
    """The model's head as the losses know it (see `proven_head`)."""
    layer, config = output_layer(model, path), model.config
    scaling = getattr(config, "logits_scaling", None)  # Granite divides
    scale = getattr(config, "logit_scale", None)  # Cohere multiplies
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return Head(
        weight_VH=layer.weight,
        bias_V=layer.bias,
        scale=float(scale or 1.0) / float(scaling or 1.0),
        cap=None if cap is None else float(cap),
    )


@torch.no_grad()
def proven_head(model: nn.Module, base: nn.Module, path: Path) -> Head:
    """`head_of`, proven: its logits of a few tokens are the model's own. UnsupportedError where they are not.

    base: the model without its head.
    """
    head = head_of(model, path)
    vocabulary, device = len(head.weight_VH), head.weight_VH.device
    ids = torch.arange(PROBE_TOKENS, device=device)[None] * 7919 % min(vocabulary, 32_000)
    hidden = base(input_ids=ids, use_cache=False).last_hidden_state
    own = model(input_ids=ids, use_cache=False).logits[0].float()
    ours = head.logits(hidden[0])
    tolerance = 1e-3 if hidden.dtype == torch.float32 else 5e-2
    if not float((own - ours).norm()) <= tolerance * float(own.norm()):
        raise UnsupportedError(
            f"{path}: {type(model).__name__} computes its logits in a way that the losses do not follow (not scale * "
            "(W h + b), capped); choose another model"
        )
    return head
