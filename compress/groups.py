"""Which linears share an input, and what produced it: read off a running block, never from a table of families.

A *group* is the set of linears that receive the same tensor. A smoothing scale s (one number for each input
channel) may be multiplied into the columns of the group's weights only if something upstream can absorb 1/s. A
*fold* says what: the norm or the rows of the linear whose outputs become the group's input channels.

Folds are found by probing: the candidate's outputs are multiplied by random factors, the block runs on a few
tokens, and the factors are looked for in the group's input. That finds `norm -> q, k, v`, `up -> down` past the
gate, grouped-query `v -> o` (one row feeding several heads' channels), the value rows inside a fused `qkv` in any
arrangement, and norms that compute `1 + w`, all by the same rule; and it refuses what is not linear (`gate`, `q`).

Shapes: B batch, T tokens, O out_features, I in_features, R rows of the producer
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.linear import is_linear, linears, parameter, weight_OI

# float32 noise of a ratio of two block activations; wrong producers miss by orders of magnitude more.
_PROPORTIONAL = 1e-3


@dataclass(frozen=True, kw_only=True)
class Fold:
    """How a group's 1/s is absorbed upstream: the producer's `rows[c]` feeds input channel c.

    For row j of the producer with factor s_j: weight_j <- (weight_j + offset) / s_j - offset, bias_j <- bias_j / s_j.
    `offset` is 1 for norms that compute `1 + w`, else 0. rows: int64 `[I]`.
    """

    producer: str
    offset: float
    rows: Tensor

    def channels_share(self) -> Tensor:
        """For each input channel the index of its scale: channels fed by one row share it. int64 `[I]`."""
        shared: Tensor = torch.unique(self.rows, return_inverse=True)[1]
        return shared


@dataclass(frozen=True, kw_only=True)
class Group:
    """Linears of a block that receive the same tensor, in order of execution; `fold` is None when none was proven."""

    layers: tuple[str, ...]
    in_features: int
    fold: Fold | None
    reason: str

    @property
    def name(self) -> str:
        return "+".join(layer.rsplit(".", 1)[-1] for layer in self.layers)


@dataclass(frozen=True)
class _Trace:
    """The order in which linears and norms ran, with the tensors they received and returned."""

    order: list[str]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def find_groups(block: nn.Module, run: Callable[[], Tensor]) -> list[Group]:
    """The block's groups with their folds. `run` runs the loaded block on the probe tokens (at least 8).

    The block's weights are perturbed during the search and restored exactly. Linears that did not run form groups of
    their own without a fold (their reason says so).
    """
    trace = _record(block, run)
    groups: list[list[str]] = []
    keys: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for name in trace.order:
        if name not in trace.inputs or not is_linear(block.get_submodule(name)):
            continue
        x = trace.inputs[name]
        key = (x.data_ptr(), (x.numel(), x.shape[-1]))
        if key not in keys:
            keys[key] = []
            groups.append(keys[key])
        keys[key].append(name)
    found = [_with_fold(block, run, trace, tuple(names)) for names in groups]
    never = [name for name in linears(block) if name not in trace.inputs]
    for name in never:
        size = weight_OI(block.get_submodule(name)).shape[1]
        found.append(Group(layers=(name,), in_features=size, fold=None, reason="the layer did not run on the probe"))
    return found


def apply_fold(block: nn.Module, fold: Fold, s_I: Tensor, store: torch.dtype) -> Tensor:
    """Divide the producer by s in place; returns the s_I that its consumers must be multiplied by.

    A norm's weight is rounded to the `store` dtype here, and the returned scale is the one that the *rounded* norm
    implies, so that rounding the norm costs nothing: its error moves into weights that are quantized anyway.
    """
    module = block.get_submodule(fold.producer)
    linear = is_linear(module)
    weight = weight_OI(module) if linear else parameter(module, "weight")
    num_rows = weight.shape[0]
    s_R = torch.ones(num_rows, dtype=torch.float32, device=s_I.device)
    s_R[fold.rows] = s_I
    if linear:
        weight.copy_(weight / s_R.to(weight.dtype).unsqueeze(1))
    else:
        old = weight.float() + fold.offset
        stored = ((old / s_R) - fold.offset).to(store).float()
        usable = (stored + fold.offset).abs() > 1e-6 * old.abs().max()
        stored = torch.where(usable, stored, weight.float())
        s_R = torch.where(usable & (old != 0), old / (stored + fold.offset), torch.ones_like(s_R))
        weight.copy_(stored)
    bias = _bias(module)
    if bias is not None:
        bias.copy_(bias / s_R.to(bias.dtype))
    return s_R[fold.rows]


def output_unchanged(before: Tensor, after: Tensor, hidden: Tensor) -> bool:
    """Whether a fold left the block's output alone, up to float32 noise.

    The tolerance is relative to what the block adds to its input, so that a large residual stream cannot hide a
    wrong fold.
    """
    change = torch.linalg.vector_norm((after - before).double())
    added = torch.linalg.vector_norm((before - hidden).double())
    total = torch.linalg.vector_norm(before.double())
    return bool(change <= 1e-3 * added + 1e-6 * total)


# ---- recording and probing ---------------------------------------------------------------------------


def _bias(module: nn.Module) -> Tensor | None:
    bias = module._parameters.get("bias")
    return None if bias is None else bias.data


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 1 and not is_linear(module)


def _record(block: nn.Module, run: Callable[[], Tensor]) -> _Trace:
    trace = _Trace(order=[], inputs={}, outputs={})

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def save(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if name not in trace.inputs and args:
                trace.order.append(name)
                # Held alive, so that no later tensor can reuse the address that groups are told apart by.
                trace.inputs[name], trace.outputs[name] = args[0], output

        return save

    handles = [m.register_forward_hook(hook(n)) for n, m in block.named_modules() if is_linear(m) or _is_norm(m)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return trace


@contextmanager
def _scaled(module: nn.Module, factor_R: Tensor, offset: float) -> Iterator[None]:
    """The module with its output rows multiplied by `factor_R`; restored exactly afterwards."""
    weight = weight_OI(module) if is_linear(module) else parameter(module, "weight")
    bias = _bias(module)
    kept = weight.clone()
    kept_bias = bias.clone() if bias is not None else None
    factor = factor_R.to(weight.device, weight.dtype)
    try:
        weight.copy_((kept + offset) * (factor.unsqueeze(1) if weight.ndim == 2 else factor) - offset)
        if bias is not None and kept_bias is not None:
            bias.copy_(kept_bias * factor.to(bias.dtype))
        yield
    finally:
        weight.copy_(kept)
        if bias is not None and kept_bias is not None:
            bias.copy_(kept_bias)


def _with_fold(block: nn.Module, run: Callable[[], Tensor], trace: _Trace, layers: tuple[str, ...]) -> Group:
    x = trace.inputs[layers[0]]
    size = x.shape[-1]
    before = trace.order[: trace.order.index(layers[0])]
    ran = [name for name in reversed(before) if name in trace.outputs]
    # The direct producer first: it is nearly always the right one, and then one probe settles the matter.
    direct = [n for n in ran if trace.outputs[n].data_ptr() == x.data_ptr()]
    disproven = []
    for name in direct + [n for n in ran if n not in direct]:
        fold = _probe(block, run, name, layers[0], x)
        if fold is None:
            continue
        if not _proven(block, run, fold, layers):
            disproven.append(name)
            continue
        return Group(layers=layers, in_features=size, fold=fold, reason="")
    reason = "no norm or linear upstream can absorb a scale" if ran else "its input enters the block from outside"
    if disproven:
        reason = f"its input follows {' and '.join(disproven)}, but a scale folded there changed the block's output"
    return Group(layers=layers, in_features=size, fold=None, reason=reason)


def _probe(block: nn.Module, run: Callable[[], Tensor], producer: str, consumer: str, x: Tensor) -> Fold | None:
    """The fold through which `producer` scales `consumer`'s input x `[.., I]`, or None."""
    module = block.get_submodule(producer)
    size = x.shape[-1]
    if not is_linear(module):
        if parameter(module, "weight").numel() != size:
            return None
        for offset in (0.0, 1.0):
            rows = _match(block, run, module, consumer, x, torch.arange(size), offset)
            if rows is not None and bool((rows == torch.arange(size)).all()):
                return Fold(producer=producer, offset=offset, rows=rows)
        return None
    num_rows = weight_OI(module).shape[0]
    for segments in _segmentations(num_rows, size, _head_dim(block)):
        rows = torch.full((size,), -1, dtype=torch.int64)
        for segment in segments:
            found = _match(block, run, module, consumer, x, segment, 0.0)
            if found is not None:
                rows = torch.where(found >= 0, found, rows)
        if bool((rows >= 0).all()):
            return Fold(producer=producer, offset=0.0, rows=rows)
        if not bool((rows >= 0).any()) and len(segments) == 1 and num_rows == size:
            return None
    return None


def _segmentations(num_rows: int, size: int, head_dim: int) -> list[list[Tensor]]:
    """Ways to cut a producer's rows into parts that are linear or not as a whole: all, then ever finer.

    Fused projections stack q, k, v or gate, up in equal multiples of a common size; interleaved ones alternate by
    head.
    """
    sizes = [num_rows]
    common = math.gcd(num_rows, size)
    for step in (common, math.gcd(common, head_dim) if head_dim else common):
        if step < sizes[-1] and num_rows // step <= 512:
            sizes.append(step)
    return [list(torch.arange(num_rows).split(step)) for step in sizes]


def _head_dim(block: nn.Module) -> int:
    for module in block.modules():
        for attribute in ("head_dim", "head_size"):
            value = getattr(module, attribute, None)
            if isinstance(value, int):
                return value
    return 0


def _match(
    block: nn.Module,
    run: Callable[[], Tensor],
    module: nn.Module,
    consumer: str,
    x: Tensor,
    segment: Tensor,
    offset: float,
) -> Tensor | None:
    """For each channel of x the row of `segment` that it is proportional to, or -1; None when x changes otherwise.

    Two draws of factors tell the rows apart (`_factors`); of the rows within the tolerance of a channel's two ratios
    the nearest is taken.
    """
    num_rows = (weight_OI(module) if is_linear(module) else parameter(module, "weight")).shape[0]
    size = x.shape[-1]
    flat = x.detach().reshape(-1, size).double()
    energy = flat.square().sum(0)
    alive = energy > 1e-12 * energy.max()
    factors = _factors(segment)
    ratios = []
    for drawn in factors:
        factor = torch.ones(num_rows, dtype=torch.float64)
        factor[segment] = drawn
        with _scaled(module, factor, offset):
            y = _input_of(block, run, consumer)
        if y.shape != x.shape:
            return None
        scaled = y.detach().reshape(-1, size).double()
        ratio = (scaled * flat).sum(0) / energy.clamp(min=1e-300)
        residual = (scaled - ratio * flat).square().sum(0)
        proportional = residual <= _PROPORTIONAL**2 * energy
        if not bool(proportional[alive].all()):
            return None
        ratios.append(ratio)
    rows = _nearest(torch.stack(ratios), factors.to(x.device), segment.to(x.device)).cpu()
    constant = torch.stack([(ratio - 1).abs() < _PROPORTIONAL for ratio in ratios]).all(0).cpu()
    alive = alive.cpu()
    if bool((alive & (rows < 0) & ~constant).any()):
        return None
    if not bool(alive.all()) and len(segment) == size:
        rows[~alive] = segment[~alive]  # a channel that is zero on the probe: its own row; the proof decides
    return rows


def _factors(segment: Tensor) -> Tensor:
    """Two factors for each row of a segment, float64 `[2, rows]`: places of a square grid, dealt at random.

    Any two rows differ by a step of the grid in one of the draws, which for 16384 rows is still ten times the
    tolerance; factors drawn independently collide from a thousand rows on. None is near 1, what an unaffected channel
    shows.
    """
    side = math.isqrt(max(0, len(segment) - 1)) + 1
    generator = torch.Generator().manual_seed(len(segment) * 1009 + int(segment[0]))
    place = torch.randperm(side * side, generator=generator)[: len(segment)]
    grid = torch.linspace(1.25, 2.75, side, dtype=torch.float64)
    return torch.stack([grid[place // side], grid[place % side]])


def _nearest(ratios_DI: Tensor, factors_DR: Tensor, segment: Tensor) -> Tensor:
    """For each channel the row of `segment` with the nearest factors (the worst of the draws counts), or -1."""
    rows = []
    # In parts: the distances of all channels to all rows would be gigabytes for a wide layer.
    for part_DI in ratios_DI.split(max(1, 2**22 // len(segment)), dim=1):
        distance_IR = (part_DI[:, :, None] - factors_DR[:, None]).abs().amax(0)
        nearest, index = distance_IR.min(dim=1)
        rows.append(torch.where(nearest < _PROPORTIONAL, segment[index], -1))
    return torch.cat(rows)


def _input_of(block: nn.Module, run: Callable[[], Tensor], layer: str) -> Tensor:
    seen: list[Tensor] = []
    handle = block.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        run()
    finally:
        handle.remove()
    return seen[0]


def _proven(block: nn.Module, run: Callable[[], Tensor], fold: Fold, layers: Sequence[str]) -> bool:
    """Fold a random scale, compare the block's output, and restore.

    The change is compared with what scaling the layers *without* the fold changes: a fold that is not one shows as
    soon as it is unbalanced, however small the layers' part in the block's output.
    """
    kept = keep(block, [fold.producer, *layers])
    before = run()
    shared = fold.channels_share()
    draw = torch.rand(int(shared.max()) + 1, generator=torch.Generator().manual_seed(7)) * 1.5 + 0.5
    s_I = apply_fold(block, fold, draw[shared].to(before.device), torch.float32)
    for name in layers:
        scale_columns(block.get_submodule(name), s_I)
    after = run()
    restore(block, kept)
    for name in layers:
        scale_columns(block.get_submodule(name), s_I)
    unbalanced = run()
    restore(block, kept)
    change = torch.linalg.vector_norm((after - before).double())
    effect = torch.linalg.vector_norm((unbalanced - before).double())
    return bool(change <= 1e-3 * effect)


def keep(block: nn.Module, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Copies of the named modules' own parameters, for `restore`."""
    return {
        name: {key: p.data.clone() for key, p in block.get_submodule(name)._parameters.items() if p is not None}
        for name in names
    }


def restore(block: nn.Module, kept: dict[str, dict[str, Tensor]]) -> None:
    """Put back, exactly, what `keep` copied."""
    for name, parameters in kept.items():
        for key, value in parameters.items():
            parameter(block.get_submodule(name), key).copy_(value)


def scale_columns(module: nn.Module, s_I: Tensor) -> None:
    """Multiply the columns of a linear's weight by s, in place."""
    w_OI = weight_OI(module)
    w_OI.mul_(s_I.to(w_OI.dtype))
