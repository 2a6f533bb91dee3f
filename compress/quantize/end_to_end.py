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

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compress import learned, numerics
from compress.losses import at_once
from compress.losses.at_once import Weights
from compress.losses.heads import DenseTeacher, Head
from compress.losses.in_blocks import Objective
from compress.quantize import captured_update
from compress.quantize.captured_update import Changed
from compress.quantize.tune import RowOrder
from compress.quantized import QuantizedWeight
from compress.scheme import Scheme
from compress.side_stream import side_stream
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

# Weights made together, at most: one launch for many layers in place of one a layer, whose number rules the time of a
# small model, against the memory of temporaries.
TOGETHER = 1 << 26


class _Linears:
    """The rows of several linears of one input width, made of their codes and of logarithms of factors, `[O, G]`."""

    def __init__(self, names: Sequence[str], weights: Sequence[QuantizedWeight], device: torch.device, codes: bool):
        self.names, self.rows = names, [len(weight.codes_OI) for weight in weights]
        self.scheme, self.stored_dtype = weights[0].scheme, weights[0].scale_OG.dtype
        codes_OI = torch.cat([weight.codes_OI for weight in weights]).to(device)
        self.scale_OG = torch.cat([weight.scale_OG for weight in weights]).to(device).float()
        self.zero_OG = torch.cat([weight.zero_point_OG for weight in weights]).to(device).float()
        self.log = nn.Parameter(torch.zeros_like(self.scale_OG))
        self.codes_OI = nn.Parameter(codes_OI.float()) if codes else codes_OI

    def made(self) -> Tensor:
        return learned.dequantized(self.codes_OI, self.log, *self._rest())

    def as_stored(self) -> list[QuantizedWeight]:
        whole = learned.as_stored(self.codes_OI.detach(), self.log.detach(), *self._rest())
        parts = (part.split(self.rows) for part in (whole.codes_OI, whole.scale_OG, whole.zero_point_OG))
        return [
            QuantizedWeight(codes_OI=codes, scale_OG=scale, zero_point_OG=zero, scheme=self.scheme)
            for codes, scale, zero in zip(*parts, strict=True)
        ]

    def _rest(self) -> tuple[Tensor, Tensor, Scheme, torch.dtype]:
        return self.scale_OG, self.zero_OG, self.scheme, self.stored_dtype


class _Norms:
    """The weights of several norms of one width, made of logarithms of factors; a row each."""

    def __init__(self, names: Sequence[str], starts: Sequence[Tensor], offset: float, device: torch.device) -> None:
        self.names, self.rows, self.offset = names, [1] * len(starts), offset
        self.start = torch.stack(list(starts)).to(device)
        self.log = nn.Parameter(torch.zeros_like(self.start, dtype=torch.float32))

    def made(self) -> Tensor:
        wanted = self._wanted()
        return wanted + (self._stored().to(wanted) - wanted).detach()

    def as_stored(self) -> list[Tensor]:
        return list(self._stored().detach().cpu())

    def _wanted(self) -> Tensor:
        return (self.start.float() + self.offset) * self.log.exp() - self.offset

    def _stored(self) -> Tensor:
        return self._wanted().to(self.start.dtype)


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
    """What weights are made of, and the modules that use them, by the names of linears and norms."""

    linears: Sequence[_Linears]
    norms: Sequence[_Norms]
    modules: Mapping[str, nn.Module]

    @property
    def all(self) -> list[_Linears | _Norms]:
        return [*self.linears, *self.norms]

    def of_rate(self, options: EndToEndOptions) -> list[dict[str, Any]]:
        """Adam's groups, each with the rate that it begins with."""
        groups = [{"params": [stack.log for stack in self.all], "begins": options.rate}]
        codes = [stack.codes_OI for stack in self.linears if isinstance(stack.codes_OI, nn.Parameter)]
        if codes:  # a code's gradient is a weight's times a step of the grid: near Adam's usual eps of 1e-8
            groups.append({"params": codes, "begins": options.code_rate, "eps": 1e-12})
        return groups

    def place(self) -> Callable[[], None]:
        """Give the modules the weights of now. What is returned, called behind their backward pass, passes their
        gradients on to what they are made of."""
        placed = []
        for stack in self.all:
            made = stack.made()
            parts = [part.requires_grad_(made.requires_grad) for part in made.detach().split(stack.rows)]
            for name, part in zip(stack.names, parts, strict=True):
                self.modules[name].weight = part if isinstance(stack, _Linears) else part[0]
            placed.append((made, parts))

        def passed_on() -> None:
            for made, parts in placed:
                made.backward(torch.cat([_gradient(part) for part in parts]))

        return passed_on


def _gradient(part: Tensor) -> Tensor:
    return torch.zeros_like(part) if part.grad is None else part.grad


def _learn(student: Student, options: EndToEndOptions) -> _Learning:
    """What stands in the place of weights, which the modules lose: `place` gives them those of now."""
    for p in student.model.parameters():
        p.requires_grad_(False)
    modules = {name: student.model.get_submodule(name) for name in [*student.layers, *student.norms]}
    device = student.head.weight_VH.device
    norms = []
    for (offset, _, _), names in _alike(
        {n: (offset_of(modules[n]), tuple(start.shape), start.dtype) for n, start in student.norms.items()}
    ):
        norms.append(_Norms(names, [student.norms[n] for n in names], offset, device))
    found = []
    kinds = {n: (w.scheme, w.codes_OI.shape[1], w.scale_OG.dtype) for n, w in student.layers.items()}
    for _, names in _alike(kinds):
        for part in _parts(names, [student.layers[n].codes_OI.numel() for n in names]):
            found.append(_Linears(part, [student.layers[n] for n in part], device, codes=options.code_rate > 0))
    for module in modules.values():
        del module._parameters["weight"]
    return _Learning(linears=found, norms=norms, modules=modules)


def _alike(kinds: Mapping[str, Any]) -> list[tuple[Any, list[str]]]:
    """Names of each kind, in the order in which they come."""
    out: dict[Any, list[str]] = {}
    for name, kind in kinds.items():
        out.setdefault(kind, []).append(name)
    return list(out.items())


def _parts(names: Sequence[str], sizes: Sequence[int]) -> list[list[str]]:
    """Runs of names of at most `TOGETHER` weights, or of one."""
    out: list[list[str]] = []
    held = TOGETHER
    for name, size in zip(names, sizes, strict=True):
        if held + size > TOGETHER:
            out.append([])
            held = 0
        out[-1].append(name)
        held += size
    return out


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
    order = RowOrder(len(kept), options.seed)
    device = student.head.weight_VH.device
    divergence = partial(_divergence, student, taught, options)

    def judged() -> float:
        with torch.no_grad():
            learning.place()
            parts = [torch.tensor(held[i : i + options.rows]) for i in range(0, len(held), options.rows)]
            return sum(float(divergence(part)) * len(part) for part in parts) / len(held)

    with numerics.repeatable(device), side_stream(device):
        before = judged()
        update = _Update(student, taught, options, learning, min(options.rows, len(kept)))
        with _checkpointed(student.blocks if options.checkpointing else ()):
            tell.start("update through the whole model", options.updates)
            changed = Changed.by(update.adam, update.losses)
            run = captured_update.Repeated(update, changed, tell, blocks=student.blocks)
            for step in range(options.updates):
                update.take(kept[order.take(len(update.ids_BT))], 1 - step / options.updates)
                run()
                tell.step(step + 1)
        if not bool(update.losses.isfinite()):
            tell.note("a loss of learning through the whole model was not a number; held-out rows decide what is kept")
        del run, update  # and with them the graph's memory
        after = judged()
    for module in learning.modules.values():
        placed: Tensor = module.__dict__.pop("weight")
        module.weight = nn.Parameter(placed.detach().clone(), requires_grad=False)  # it was a part of many
    return Trained(
        layers={n: w for stack in learning.linears for n, w in zip(stack.names, stack.as_stored(), strict=True)},
        norms={n: w for stack in learning.norms for n, w in zip(stack.names, stack.as_stored(), strict=True)},
        divergences=(before, after),
        held_out_rows=len(held),
    )


class _Update:
    """An update of all that is learned, from rows and at rates that are in the same place each time.

    losses: their sum over all updates.
    """

    def __init__(
        self, student: Student, taught: Lessons, options: EndToEndOptions, learning: _Learning, num_rows: int
    ) -> None:
        self.learning = learning
        self.loss = partial(_loss, student, taught.head, options)
        self.device = student.head.weight_VH.device
        self.ids_NT, self.hidden_NTH = taught.ids_NT.to(self.device), taught.hidden_NTH
        self.ids_BT = torch.empty_like(self.ids_NT[:num_rows])
        self.hidden_BTH = torch.empty_like(self.hidden_NTH[:num_rows])
        self.losses = torch.zeros((), device=self.device)
        self.adam = captured_update.adam_on(self.device, learning.of_rate(options))

    def take(self, rows: Tensor, share: float) -> None:
        """The rows of the next update, by number, and its share of the rates that it began with. Waits for nothing."""
        if self.device.type == "cuda":
            rows = rows.pin_memory().to(self.device, non_blocking=True)
        torch.index_select(self.ids_NT, 0, rows, out=self.ids_BT)
        torch.index_select(self.hidden_NTH, 0, rows, out=self.hidden_BTH)
        captured_update.set_share(self.adam, share)

    def __call__(self) -> None:
        with torch.enable_grad():
            passed_on = self.learning.place()
            loss = self.loss(self.ids_BT, self.hidden_BTH)
            loss.backward()
            passed_on()
        self.adam.step()
        self.adam.zero_grad()
        self.losses += loss.detach()


def _divergence(student: Student, taught: Lessons, options: EndToEndOptions, rows: Tensor) -> Tensor:
    """Mean KL divergence of the student's predictions from the original's on these rows, in nats a token."""
    device = student.head.weight_VH.device
    return _loss(student, taught.head, options, taught.ids_NT[rows].to(device), taught.hidden_NTH[rows.to(device)])


def _loss(student: Student, head: Head, options: EndToEndOptions, ids_BT: Tensor, hidden_BTH: Tensor) -> Tensor:
    """The same on rows of ids, beside what the original has behind its last norm there, and its head."""
    device = ids_BT.device
    with torch.autocast(device.type, options.dtype, enabled=options.dtype != torch.float32):
        hidden_PH = _hidden(student.base, ids_BT).flatten(0, 1)
        teacher = DenseTeacher(hidden_PH=hidden_BTH.flatten(0, 1), head=head)
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
