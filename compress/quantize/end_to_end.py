"""Learn codes, scales and norms through the whole model, once its blocks are done.

Blocks are rounded one by one, each for its own output. What counts is what leaves the last one, so this lowers the
KL divergence of the quantized model's predictions from the original's, by backpropagation through all blocks, as
EfficientQAT's second phase (Chen et al., arXiv:2407.11062) does with the loss of the text and with scales alone. Zero
points stay. One factor a group of weights, one a norm channel and every code is learned; codes by the straight-through
estimate, from the integer that the blocks gave them. Rows held out decide whether the result is kept.

    norm = stored((start + offset) * exp(l) - offset)          offset: 1 for norms that compute 1 + w, else 0

Weights are those of `learned`. `stored` is what the file's 16 bits hold, and the gradient passes it unchanged. So what
is judged is what is written.

Shapes: N rows, T tokens, H hidden size, P tokens of a batch, O out_features, I in_features, G groups along I
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

from compress import learned, numerics
from compress.losses import at_once
from compress.losses.at_once import Weights
from compress.losses.heads import DenseTeacher, Head
from compress.losses.in_blocks import Objective
from compress.quantize.tune import RowOrder
from compress.quantized import QuantizedWeight
from compress.scheme import Scheme
from compress.tell import SILENT, Tell

RATE = 3e-4  # of Adam, in logarithms: relative steps
CODE_RATE = 1e-2  # in steps of the grid
# Every so manieth row is never trained on; an odd number, so that both of two kinds of rows that alternate have a part.
HELD_OUT = 15
# Logits of each model held at once.
CPU_LOGITS, GPU_LOGITS = 1 << 22, 1 << 26


@dataclass(frozen=True, kw_only=True)
class EndToEndOptions:
    """updates: of all factors. rows: calibration rows an update. rate: the first update's; it falls to zero. code_rate:
    the same of codes, in steps of the grid; 0 leaves them. seed: of the rows' order. dtype: of matrix products.
    checkpointing: compute blocks again in the backward pass."""

    updates: int
    rows: int = 8
    rate: float = RATE
    code_rate: float = CODE_RATE
    seed: int = 0
    dtype: torch.dtype = torch.float32
    checkpointing: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Student:
    """The quantized model as a transformers model in memory: float32, each weight as the file's codes give it.

    base: the model without its head. layers: the quantized linears by name in the model; norms: as the file holds them.
    """

    base: nn.Module
    head: Head
    blocks: Sequence[nn.Module]
    model: nn.Module
    layers: Mapping[str, QuantizedWeight]
    norms: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Lessons:
    """Rows of ids, int64 `[N, T]`, and what the original model has behind its last norm on them, `[N, T, H]`."""

    ids_NT: Tensor
    hidden_NTH: Tensor
    head: Head


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """Layers and norms with what was learned, by the names of `Student`, on the CPU. divergences: mean KL divergence in
    nats a token on the held-out rows, before and after."""

    layers: dict[str, QuantizedWeight]
    norms: dict[str, Tensor]
    divergences: tuple[float, float]
    held_out_rows: int

    @property
    def kept(self) -> bool:
        return self.divergences[1] < self.divergences[0]


# ---- what is learned ------------------------------------------------------------------------------------


class _Scales(nn.Module):
    """Makes a linear's weight of the logarithms of factors, `[O, G]`, which take its place among the parameters; beside
    them stand the codes where those are learned as well."""

    def __init__(self, weight: QuantizedWeight, device: torch.device, codes: bool = False) -> None:
        super().__init__()
        self.scheme, self.stored_dtype, self.codes = weight.scheme, weight.scale_OG.dtype, codes
        self.register_buffer("codes_OI", weight.codes_OI.to(device))
        self.register_buffer("scale_OG", weight.scale_OG.to(device).float())
        self.register_buffer("zero_OG", weight.zero_point_OG.to(device).float())

    def forward(self, log_OG: Tensor, latent_OI: Tensor | None = None) -> Tensor:
        return learned.dequantized(*self._parts(log_OG, latent_OI))

    def right_inverse(self, weight_OI: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        log_OG = torch.zeros_like(self.get_buffer("scale_OG"), dtype=torch.float32)
        return (log_OG, self.get_buffer("codes_OI").float()) if self.codes else log_OG

    def learned(self, log_OG: Tensor, latent_OI: Tensor | None = None) -> QuantizedWeight:
        return learned.as_stored(*self._parts(log_OG, latent_OI))

    def _parts(
        self, log_OG: Tensor, latent_OI: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Scheme, torch.dtype]:
        codes_OI, scale_OG, zero_OG = (self.get_buffer(name) for name in ("codes_OI", "scale_OG", "zero_OG"))
        codes_OI = codes_OI if latent_OI is None else latent_OI
        return codes_OI, log_OG, scale_OG, zero_OG, self.scheme, self.stored_dtype


class _Channels(nn.Module):
    """Makes a norm's weight `[H]` of the logarithms of factors."""

    def __init__(self, start: Tensor, offset: float, device: torch.device) -> None:
        super().__init__()
        self.offset = offset
        self.register_buffer("start", start.to(device))

    def forward(self, log: Tensor) -> Tensor:
        wanted = self._wanted(log)
        return wanted + (self.learned(log).to(wanted) - wanted).detach()

    def right_inverse(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight)

    def _wanted(self, log: Tensor) -> Tensor:
        return (self.get_buffer("start").float() + self.offset) * log.exp() - self.offset

    def learned(self, log: Tensor) -> Tensor:
        return self._wanted(log).to(self.get_buffer("start").dtype)


@torch.no_grad()
def offset_of(norm: nn.Module) -> float:
    """1.0 for a norm that multiplies by `1 + weight`, 0.0 for one that multiplies by `weight`."""
    weight = norm._parameters["weight"]
    assert weight is not None
    x = torch.linspace(1, 2, weight.numel(), device=weight.device, dtype=weight.dtype)[None, None]
    x = x * torch.tensor([1.0, -1.0], device=x.device, dtype=x.dtype).repeat(weight.numel())[: weight.numel()]
    kept = weight.clone()
    weight.zero_()
    plus, minus = norm(x), norm(-x)  # a bias is the same in both
    weight.copy_(kept)
    return 1.0 if bool((plus != minus).any()) else 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class _Learning:
    """What makes the weights, by the names of linears and norms, and what it makes them of: logarithms of factors, and
    codes where those are learned."""

    makes: dict[str, _Scales | _Channels]
    parameters: dict[str, list[nn.Parameter]]

    def of_rate(self, options: EndToEndOptions) -> list[dict[str, Any]]:
        """Adam's groups, each with the rate that it begins with."""
        groups = [{"params": [held[0] for held in self.parameters.values()], "begins": options.rate}]
        codes = [latent for held in self.parameters.values() for latent in held[1:]]
        if codes:  # a code's gradient is a weight's times a step of the grid: near Adam's usual eps of 1e-8
            groups.append({"params": codes, "begins": options.code_rate, "eps": 1e-12})
        return groups


def _learn(student: Student, options: EndToEndOptions) -> _Learning:
    """Put what is learned in the place of weights."""
    for p in student.model.parameters():
        p.requires_grad_(False)
    makes: dict[str, _Scales | _Channels] = {}
    for name in [*student.layers, *student.norms]:
        module = student.model.get_submodule(name)
        device = next(module.parameters()).device
        if name in student.layers:
            makes[name] = _Scales(student.layers[name], device, codes=options.code_rate > 0)
        else:
            makes[name] = _Channels(student.norms[name], offset_of(module), device)
        register_parametrization(module, "weight", makes[name], unsafe=True)  # what is learned has another shape
    parameters = {
        name: list(student.model.get_submodule(f"{name}.parametrizations.weight").parameters()) for name in makes
    }
    for held in parameters.values():
        for p in held:
            p.requires_grad_(True)
    return _Learning(makes=makes, parameters=parameters)


# ---- training -------------------------------------------------------------------------------------------


@torch.no_grad()
def lessons(base: nn.Module, head: Head, ids_NT: Tensor, rows: int, dtype: torch.dtype) -> Lessons:
    """What the original model has to teach on these rows; computed `rows` at a time. Its head is kept as it is."""
    device = head.weight_VH.device
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        parts = [_hidden(base, part.to(device)) for part in ids_NT.split(rows)]
    head = Head(
        weight_VH=head.weight_VH.detach(),
        bias_V=None if head.bias_V is None else head.bias_V.detach(),
        scale=head.scale,
        cap=head.cap,
    )
    return Lessons(ids_NT=ids_NT, hidden_NTH=torch.cat(parts), head=head)


def held_out(num_rows: int) -> list[int]:
    """The rows that are never trained on: evenly spread, one at least."""
    return list(range(HELD_OUT - 1, num_rows, HELD_OUT)) or [num_rows - 1]


def train(student: Student, taught: Lessons, options: EndToEndOptions, tell: Tell = SILENT) -> Trained:
    """Learn the student's codes, scales and norms from the lessons; see the module docstring. Changes its model.

    At least two rows. Deterministic on the CPU, and on a GPU as far as `numerics.repeatable` goes.
    """
    learning = _learn(student, options)
    held = held_out(len(taught.ids_NT))
    kept = torch.tensor([i for i in range(len(taught.ids_NT)) if i not in set(held)])
    adam = torch.optim.Adam(learning.of_rate(options), lr=options.rate)
    order = RowOrder(len(kept), options.seed)
    device = student.head.weight_VH.device
    divergence = partial(_divergence, student, taught, options)

    def judged() -> float:
        with torch.no_grad():
            parts = [torch.tensor(held[i : i + options.rows]) for i in range(0, len(held), options.rows)]
            return sum(float(divergence(part)) * len(part) for part in parts) / len(held)

    with numerics.repeatable(device):
        before = judged()
        with _checkpointed(student.blocks if options.checkpointing else ()):
            tell.start("update through the whole model", options.updates)
            for step in range(options.updates):
                for group in adam.param_groups:
                    group["lr"] = group["begins"] * (1 - step / options.updates)
                with torch.enable_grad():
                    divergence(kept[order.take(min(options.rows, len(kept)))]).backward()
                adam.step()
                adam.zero_grad()
                tell.step(step + 1)
        after = judged()
    with torch.no_grad():
        made = {name: makes.learned(*learning.parameters[name]) for name, makes in learning.makes.items()}
        return Trained(
            layers={name: value for name, value in made.items() if isinstance(value, QuantizedWeight)},
            norms={name: value.cpu() for name, value in made.items() if isinstance(value, Tensor)},
            divergences=(before, after),
            held_out_rows=len(held),
        )


def _divergence(student: Student, taught: Lessons, options: EndToEndOptions, rows: Tensor) -> Tensor:
    """Mean KL divergence of the student's predictions from the original's on these rows, in nats a token."""
    device = student.head.weight_VH.device
    ids_BT = taught.ids_NT[rows].to(device)
    with torch.autocast(device.type, options.dtype, enabled=options.dtype != torch.float32):
        hidden_PH = _hidden(student.base, ids_BT).flatten(0, 1)
        teacher = DenseTeacher(hidden_PH=taught.hidden_NTH[rows.to(device)].flatten(0, 1), head=taught.head)
        share_P = torch.full((len(hidden_PH),), 1 / len(hidden_PH), device=device)
        total, _, _ = at_once.total(
            hidden_PH,
            student.head,
            teacher,
            torch.zeros_like(ids_BT).flatten(),
            Objective(),
            Weights(divergence_P=share_P, cross_entropy_P=None),
            budget=GPU_LOGITS if device.type == "cuda" else CPU_LOGITS,
        )
    return total


def _hidden(base: nn.Module, ids_BT: Tensor) -> Tensor:
    """Behind the last norm, `[B, T, H]`."""
    found: Tensor = base(input_ids=ids_BT, use_cache=False).last_hidden_state
    return found


@contextmanager
def _checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Blocks compute their inner values again in the backward pass, inside the context."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
