"""Learn which way to round: a block's codes, scales and norms tuned on the block's own output.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent" (SignRound, AutoRound), arXiv:2309.05516: a weight
takes code `round(w / scale + v)` with a learned offset v of at most half a step, moved by the sign of its gradient. The
loss is the squared distance between the block's output on the compressed path and the original model's there, so a
block also learns to make up for the blocks before it. Here, and not in the paper:

- It starts from the codes of error feedback, not from round-to-nearest: offsets count from half-way between each code
  and the weight that it was rounded from, so that a doubtful code changes early and a certain one late.
- Scales are learned with codes fixed (in log space, by sign), and norm weights with Adam.
- The last step is kept, with the rate fallen to zero, not the step whose one batch happened to fit best.
- Rows held out decide whether the result is kept at all.

The gradient needs no fake-quantizer in the graph. The weight is `(code - zero_point) * scale`, so the gradient with
respect to v (through the rounding) has the sign of that with respect to the weight, and the one with respect to
log(scale) is the sum of gradient times weight over the group. On a GPU, updates are replays of a CUDA graph of one.

Shapes: N rows, T tokens, H hidden size, O out_features, I in_features, G groups along I, g group size
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress import numerics
from compress.quantize.captured_update import Changed, Repeated, adam_on, changed_rate, rate_on, set_share, state_of
from compress.quantize.feedback import Rounded
from compress.scheme import Scheme
from compress.side_stream import side_stream
from compress.tell import Heard

RATE = 0.005  # of offsets (in steps of the grid) and of log-scales; the paper's, for 200 steps
NORM_RATE = 1e-3
# Wider groups do not fit a tile of the kernels'.
_KERNEL_COLUMNS = 4096
HELD_OUT = 16  # one row in so many, at least one, is never trained on
# Learned numbers beyond which updates are launched one by one: a GPU should be the slower one there (not measured).
MOST = 1 << 26


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """steps: updates a block. rows: calibration rows an update. seed: of their order."""

    steps: int = 200
    rows: int = 4
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """layers: the rounded weights, by name. norms: parameters tuned beside them. errors: mean squared distance of the
    block's output from its target on the held-out rows, before and after; when it did not fall, nothing was changed.
    said: why it took longer than it might."""

    layers: dict[str, Rounded]
    norms: dict[str, Tensor]
    errors: tuple[float, float]
    said: list[str] = field(default_factory=list)

    @property
    def kept(self) -> bool:
        return self.errors[1] < self.errors[0]


class _Layer:
    """One weight while it is learned: `code = clamp(round(start + offset))`."""

    def __init__(self, rounded: Rounded, scheme: Scheme) -> None:
        self.scheme = scheme
        self.zero_OG1 = rounded.zero_point_OG.contiguous().unsqueeze(-1)
        self.scale_OG1 = rounded.scale_OG.contiguous().unsqueeze(-1)
        self.log_OG1 = torch.zeros_like(self.scale_OG1)
        assert rounded.wanted_OI is not None
        wanted = numerics.to_groups(rounded.wanted_OI, scheme) / self.scale_OG1 + self.zero_OG1
        codes = numerics.to_groups(rounded.codes_OI, scheme).float()
        self.start_OGg = codes + 0.5 * (wanted.clamp_(-0.5, scheme.max_code + 0.5) - codes).clamp_(-0.5, 0.5)
        self.offset_OGg = torch.zeros_like(self.start_OGg)
        self.kernel = self.start_OGg.is_cuda and self.start_OGg.shape[-1] <= _KERNEL_COLUMNS

    def codes(self) -> Tensor:
        return (self.start_OGg + self.offset_OGg).round_().clamp_(0, self.scheme.max_code)

    def scale(self) -> Tensor:
        return self.scale_OG1 * self.log_OG1.exp()

    def weight(self) -> Tensor:
        if self.kernel:
            made: Tensor = kernels().weight(
                self.start_OGg, self.offset_OGg, self.scale(), self.zero_OG1, self.scheme.max_code
            )
            return made.flatten(1)
        return ((self.codes() - self.zero_OG1) * self.scale()).flatten(1)

    def step(self, weight_OI: Tensor, rate: float | Tensor) -> None:
        """Move against the gradient held by `weight_OI`, a leaf made by `weight()`. On a GPU the rate is there, too."""
        assert weight_OI.grad is not None
        if self.kernel:
            assert isinstance(rate, Tensor)
            gradient_OI = weight_OI.grad.contiguous()
            kernels().step(gradient_OI, weight_OI.detach(), self.offset_OGg, self.log_OG1, rate)
            return
        gradient = numerics.to_groups(weight_OI.grad, self.scheme)
        self.log_OG1 -= rate * (gradient * numerics.to_groups(weight_OI.detach(), self.scheme)).sum(-1, True).sign_()
        self.offset_OGg.sub_(gradient.sign_().mul_(rate)).clamp_(-0.5, 0.5)

    def rounded(self, old: Rounded) -> Rounded:
        return Rounded(
            codes_OI=self.codes().flatten(1).to(torch.uint8),
            scale_OG=numerics.round_scale(self.scale().squeeze(-1)),
            zero_point_OG=old.zero_point_OG,
            wanted_OI=old.wanted_OI,
            factor_OG=old.factor_OG,
        )


def tune_block(
    layers: Mapping[str, Rounded],
    norms: Mapping[str, Tensor],
    forward: Callable[[Tensor, Mapping[str, Tensor]], Tensor],
    inputs_NTH: Tensor,
    targets_NTH: Tensor,
    scheme: Scheme,
    options: TuneOptions,
) -> Tuned:
    """Tune a block's rounded weights and norm weights; see the module docstring.

    layers: by parameter name. norms: other float32 parameters to learn, by name. forward(hidden, parameters) is the
    block, differentiable with respect to the parameters. inputs_NTH, targets_NTH: what enters it, and what should leave
    it, on the same device. Deterministic on the CPU; on a GPU inside `numerics.repeatable`, as far as PyTorch can be.
    """
    held = max(1, len(inputs_NTH) // HELD_OUT)
    train = len(inputs_NTH) - held
    start = {name: r.dequantize(scheme) for name, r in layers.items()}

    def held_out_error(parameters: Mapping[str, Tensor]) -> float:
        with torch.no_grad():
            total = 0.0
            for i in range(train, len(inputs_NTH)):
                out = forward(inputs_NTH[i : i + 1], parameters)
                total += numerics.mean_of((out.float() - targets_NTH[i : i + 1].float()).square())
        return total / held

    before = held_out_error({**start, **norms})
    if train < 1:
        return Tuned(layers=dict(layers), norms=dict(norms), errors=(before, before))
    learned = {name: _Layer(r, scheme) for name, r in layers.items()}
    free = {name: value.clone().requires_grad_() for name, value in norms.items()}
    update = _Update(learned, free, forward, (inputs_NTH[:train], targets_NTH[:train]), options)
    heard = Heard()
    with side_stream(inputs_NTH.device):
        run = Repeated(update, update.changed, heard, most=MOST)
        order = RowOrder(train, options.seed)
        rows_SR = torch.stack([order.take(update.num_rows) for _ in range(options.steps)]).to(inputs_NTH.device)
        for step, rows_R in enumerate(rows_SR):
            update.take(rows_R, 1 - step / options.steps)
            run()
        del run  # and with it the graph's memory
    tuned = {name: layer.rounded(layers[name]) for name, layer in learned.items()}
    stored = {name: value.detach().half().float() for name, value in free.items()}
    after = held_out_error({**{name: r.dequantize(scheme) for name, r in tuned.items()}, **stored})
    if not after < before:
        return Tuned(layers=dict(layers), norms=dict(norms), errors=(before, after), said=heard.said)
    return Tuned(layers=tuned, norms=stored, errors=(before, after), said=heard.said)


class _Update:
    """An update of all that is learned, from rows and at rates that are in the same place each time.

    learned: weights by parameter name. free: norms, by theirs. rows: what enters the block and what should leave it.
    """

    def __init__(
        self,
        learned: Mapping[str, _Layer],
        free: Mapping[str, Tensor],
        forward: Callable[[Tensor, Mapping[str, Tensor]], Tensor],
        rows: tuple[Tensor, Tensor],
        options: TuneOptions,
    ) -> None:
        self.learned, self.free, self.forward = learned, free, forward
        self.inputs_NTH, self.targets_NTH = rows
        self.num_rows = min(options.rows, len(self.inputs_NTH))
        self.in_RTH, self.out_RTH = (torch.empty_like(part[: self.num_rows]) for part in rows)
        device = self.inputs_NTH.device
        # Fewer steps go further each: an offset can always cross half a step.
        self.begins = RATE * 200 / options.steps
        self.rate = rate_on(device, self.begins)
        self.adam = adam_on(device, [{"params": list(free.values()), "begins": NORM_RATE}]) if free else None

    @property
    def changed(self) -> Changed:
        of_layers = [tensor for layer in self.learned.values() for tensor in (layer.offset_OGg, layer.log_OG1)]
        return Changed(
            learned=[*of_layers, *self.free.values()],
            others=lambda: [] if self.adam is None else state_of(self.adam),
        )

    def take(self, rows_R: Tensor, share: float) -> None:
        """The rows of the next update, by number, and its share of the rates that it began with. Waits for nothing."""
        torch.index_select(self.inputs_NTH, 0, rows_R, out=self.in_RTH)
        torch.index_select(self.targets_NTH, 0, rows_R, out=self.out_RTH)
        self.rate = changed_rate(self.rate, self.begins * share)
        if self.adam is not None:
            set_share(self.adam, share)

    def __call__(self) -> None:
        weights = {name: layer.weight().requires_grad_() for name, layer in self.learned.items()}
        with torch.enable_grad():
            out = self.forward(self.in_RTH, {**weights, **self.free})
            (out.float() - self.out_RTH.float()).square().mean().backward()
        for name, layer in self.learned.items():
            layer.step(weights[name], self.rate)
        if self.adam is not None:
            self.adam.step()
            self.adam.zero_grad()


@functools.cache
def kernels() -> Any:
    """`tune_triton`, compiled at first launch. A GPU has Triton: the codes came by way of it (`feedback_step`)."""
    from compress.quantize import tune_triton

    return tune_triton


class RowOrder:
    """Row numbers in shuffled order, shuffled again when used up."""

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows = num_rows
        self.generator = torch.Generator().manual_seed(seed)
        self.left = torch.empty(0, dtype=torch.int64)

    def take(self, count: int) -> Tensor:
        while len(self.left) < count:
            self.left = torch.cat([self.left, torch.randperm(self.num_rows, generator=self.generator)])
        taken, self.left = self.left[:count], self.left[count:]
        return taken
