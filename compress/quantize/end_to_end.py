"""Learn scales and norms through the whole model: the last step of effort `best`.

Blocks are tuned one by one, each on its own output. What counts is what leaves the last one, so this step lowers the
KL divergence of the quantized model's predictions from the original's, by backpropagation through all blocks, as
EfficientQAT's second phase (Chen et al., arXiv:2407.11062) does with the loss of the text. Codes and zero points stay;
one factor a group of weights and one a norm channel is learned, of which there are a hundredth of the weights: little
enough for little text not to be learned by heart. Rows held out decide whether the result is kept.

    weight = (code - zero_point) * stored(scale * exp(l))          norm = stored((start + offset) * exp(l) - offset)
    dl = sum over the group of dW * weight                         offset: 1 for norms that compute 1 + w, else 0

`stored` is what the file's 16 bits hold, and the gradient passes it unchanged. So what is judged is what is written.

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

from compress import numerics
from compress.losses import at_once
from compress.losses.at_once import Weights
from compress.losses.heads import DenseTeacher, Head
from compress.losses.in_blocks import Objective
from compress.quantize.tune import RowOrder
from compress.quantized import QuantizedWeight
from compress.scheme import Scheme
from compress.tell import SILENT, Tell

RATE = 3e-4  # of Adam, in logarithms: relative steps
# Every so manieth row is never trained on; an odd number, so that both of two kinds of rows that alternate have a part.
HELD_OUT = 15
# Logits of each model held at once.
CPU_LOGITS, GPU_LOGITS = 1 << 22, 1 << 26


@dataclass(frozen=True, kw_only=True)
class EndToEndOptions:
    """updates: of all factors. rows: calibration rows an update. rate: the first update's; it falls to zero. seed: of
    the rows' order. dtype: of matrix products. checkpointing: compute blocks again in the backward pass."""

    updates: int
    rows: int = 8
    rate: float = RATE
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


class _Dequantize(torch.autograd.Function):
    """The weight `[O, I]` of codes and scales times `exp(log_OG)`; keeps bytes, not numbers, for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, log_OG: Tensor, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, scheme: Scheme
    ) -> Tensor:
        ctx.save_for_backward(log_OG, codes_OI, scale_OG, zero_OG)
        ctx.scheme = scheme
        return _weight(log_OG, codes_OI, scale_OG, zero_OG, scheme)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        log_OG, codes_OI, scale_OG, zero_OG = ctx.saved_tensors
        weight_OGg = numerics.to_groups(_weight(log_OG, codes_OI, scale_OG, zero_OG, ctx.scheme), ctx.scheme)
        grad_OGg = numerics.to_groups(grads[0].float(), ctx.scheme)
        return (grad_OGg * weight_OGg).sum(-1), None, None, None, None


def _weight(log_OG: Tensor, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, scheme: Scheme) -> Tensor:
    codes_OGg = numerics.to_groups(codes_OI, scheme).float()
    return numerics.dequantize(codes_OGg, _held(log_OG, scale_OG).float(), zero_OG.float()).flatten(1)


def _held(log_OG: Tensor, scale_OG: Tensor) -> Tensor:
    """The scales as the file will hold them, in its dtype."""
    return (scale_OG.float() * log_OG.exp()).clamp(numerics.MIN_SCALE, numerics.MAX_SCALE).to(scale_OG.dtype)


class _Scales(nn.Module):
    """Makes a linear's weight of the logarithms of factors, `[O, G]`, which take its place among the parameters."""

    def __init__(self, weight: QuantizedWeight, device: torch.device) -> None:
        super().__init__()
        self.scheme = weight.scheme
        self.register_buffer("codes_OI", weight.codes_OI.to(device))
        self.register_buffer("scale_OG", weight.scale_OG.to(device))
        self.register_buffer("zero_OG", weight.zero_point_OG.to(device))

    def forward(self, log_OG: Tensor) -> Tensor:
        parts = (self.get_buffer(name) for name in ("codes_OI", "scale_OG", "zero_OG"))
        found: Tensor = _Dequantize.apply(log_OG, *parts, self.scheme)  # type: ignore[no-untyped-call]
        return found

    def right_inverse(self, weight_OI: Tensor) -> Tensor:
        return torch.zeros_like(self.get_buffer("scale_OG"), dtype=torch.float32)

    def learned(self, log_OG: Tensor) -> QuantizedWeight:
        return QuantizedWeight(
            codes_OI=self.get_buffer("codes_OI").cpu(),
            scale_OG=_held(log_OG, self.get_buffer("scale_OG")).cpu(),
            zero_point_OG=self.get_buffer("zero_OG").cpu(),
            scheme=self.scheme,
        )


class _Channels(nn.Module):
    """Makes a norm's weight `[H]` of the logarithms of factors."""

    def __init__(self, start: Tensor, offset: float, device: torch.device) -> None:
        super().__init__()
        self.offset = offset
        self.register_buffer("start", start.to(device))

    def forward(self, log: Tensor) -> Tensor:
        wanted = self._wanted(log)
        return wanted + (self.learned(log).float() - wanted).detach()

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


def _learn(student: Student) -> tuple[dict[str, _Scales], dict[str, _Channels], dict[str, nn.Parameter]]:
    """Put factors in the place of weights. Returns what makes the weights of them, and them, by the layers' names."""
    scales, channels, logs = {}, {}, {}
    for p in student.model.parameters():
        p.requires_grad_(False)
    for name, weight in student.layers.items():
        module = student.model.get_submodule(name)
        scales[name] = _Scales(weight, next(module.parameters()).device)
        logs[name] = _replaced(module, scales[name])
    for name, start in student.norms.items():
        module = student.model.get_submodule(name)
        channels[name] = _Channels(start, offset_of(module), next(module.parameters()).device)
        logs[name] = _replaced(module, channels[name])
    return scales, channels, logs


def _replaced(module: nn.Module, makes: nn.Module) -> nn.Parameter:
    register_parametrization(module, "weight", makes, unsafe=True)  # the factors have another shape
    log = module.parametrizations.weight.original  # type: ignore[union-attr]
    assert isinstance(log, nn.Parameter)
    log.requires_grad_()
    return log


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
    """Learn the student's scales and norms from the lessons; see the module docstring. Changes the student's model.

    At least two rows. Deterministic on the CPU, and on a GPU as far as `numerics.repeatable` goes.
    """
    scales, channels, logs = _learn(student)
    held = held_out(len(taught.ids_NT))
    kept = torch.tensor([i for i in range(len(taught.ids_NT)) if i not in set(held)])
    adam = torch.optim.Adam(list(logs.values()), lr=options.rate)
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
            tell.start("update of scales and norms", options.updates)
            for step in range(options.updates):
                adam.param_groups[0]["lr"] = options.rate * (1 - step / options.updates)
                with torch.enable_grad():
                    divergence(kept[order.take(min(options.rows, len(kept)))]).backward()
                adam.step()
                adam.zero_grad()
                tell.step(step + 1)
        after = judged()
    with torch.no_grad():
        return Trained(
            layers={name: made.learned(logs[name]) for name, made in scales.items()},
            norms={name: made.learned(logs[name]).cpu() for name, made in channels.items()},
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
