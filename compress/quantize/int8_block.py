"""How one loaded block becomes INT8: search, fold, prove, calibrate, round.

The algorithms are in files of their own (`smoothquant`, `int8`, `static_range`, `retarget`); this file only applies
them to a block in the right order. What was tried and what won is in METHODS.md.

    fast      smoothing scales; ranges fitted to the mean square of the inputs; rounded to nearest
    balanced  the same scales; retargeted, also for the rounding of the inputs; rounded with error feedback

Shapes: S sampled tokens, M measured ones, O out_features, I in_features
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from compress import activations, numerics
from compress.block import BlockResult, LoadedBlock
from compress.errors import ConfigError
from compress.groups import Group
from compress.linear import linears, weight_OI
from compress.plan import ActivationScheme, LayerPlan, LayerScheme
from compress.quantize import int8
from compress.quantize.damage import refuse_damage, refuse_drowning, relative_error
from compress.quantize.feedback import Rounded
from compress.quantize.folding import fold_proven
from compress.quantize.int8 import InputNoise
from compress.quantize.retarget import STRENGTH, retarget
from compress.quantize.smoothquant import STRENGTHS, SampledInputs, Smoothing, fake_quantized, search_smoothing
from compress.quantize.stacks import stacks
from compress.quantize.static_range import fit_static
from compress.quantize.stored import dense_tensors
from compress.quantized import QuantizedWeight, StaticInput
from compress.scheme import Scheme
from compress.statistics import InputStatistics, Wanted, kept_share

EFFORTS = ("fast", "balanced")
# Tokens of each group's inputs that are kept: to go down on, and, every so manieth, to measure on.
SAMPLED_ROWS = 8192
MEASURED_ROWS = 1024
# Of those, every second is enough to tell scales from each other, and to report errors.
SEARCHED = 2
# The part of the weights' rounding error that error feedback leaves, as the search of scales counts it (METHODS.md).
FEEDBACK_SHARE = 0.3


@dataclass(frozen=True, kw_only=True)
class Int8Options:
    """Choices of the method. strength: of SmoothQuant's formula for every group, 0 for no smoothing, None to search.

    dtype: what the file holds scales and everything that is not quantized in. allow_damage: go on when a layer's output
    is mostly error (`damage`), instead of stopping.
    """

    effort: str = "balanced"
    strength: float | None = None
    allow_damage: bool = False
    dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if self.effort not in EFFORTS:
            raise ConfigError(f"effort {self.effort!r} is not one of {', '.join(EFFORTS)}; choose one of these")
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise ConfigError(f"--smoothing {self.strength} is outside 0..1; choose auto, or 0.8 as SmoothQuant does")

    @property
    def feedback(self) -> bool:
        return self.effort != "fast"

    @property
    def paths(self) -> int:
        """How many paths of hidden states the method must be given; see `blocks.stream`."""
        return 2 if self.feedback else 1

    @property
    def wanted(self) -> Wanted:
        """What the method asks of the statistics: Gram matrices are for error feedback."""
        return Wanted(gram=self.feedback, ranges=True, rows=SAMPLED_ROWS)


@dataclass(kw_only=True)
class _Work:
    """A block on its way. row_scale: what rows of a layer were divided by. inputs: calibrated ranges by layer."""

    loaded: LoadedBlock
    options: Int8Options
    current: Tensor
    row_scale: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, StaticInput] = field(default_factory=dict)
    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Members:
    """The linears of a group that are quantized, all in one scheme, and their inputs.

    power_I: mean squares of the sampled inputs. measured_MI: tokens that errors and ranges are measured on. Once the
    group is smoothed, these and the statistics are those of the smoothed inputs, and of the statistics' own tokens none
    are left.
    """

    group: Group
    names: list[str]
    scheme: LayerScheme
    statistics: InputStatistics
    power_I: Tensor
    measured_MI: Tensor

    @property
    def searched_MI(self) -> Tensor:
        """Fewer of the measured tokens; all where one range is for all of them."""
        dynamic = self.scheme.input is None or self.scheme.input.dynamic
        return self.measured_MI[::SEARCHED] if dynamic else self.measured_MI

    @property
    def weight(self) -> Scheme:
        assert self.scheme.weight is not None
        return self.scheme.weight


def int8_block(loaded: LoadedBlock, plan: LayerPlan, options: Int8Options) -> BlockResult:
    """Quantize one block; see the module docstring. Changes the loaded weights."""
    work = _Work(loaded=loaded, options=options, current=loaded.check_output)
    if not options.allow_damage:
        for name, module in linears(loaded.module).items():
            if not plan[loaded.prefix + name].is_dense:
                refuse_drowning(loaded.prefix + name, weight_OI(module))
    static = any(scheme.input is not None and not scheme.input.dynamic for scheme in plan.groups())
    more = _check_rows(loaded) if static else [torch.empty(0)] * len(loaded.groups)
    cache = {"kv_cache": loaded.cache_errors()} if plan.kv else {}
    groups, reports = [], []
    for group, statistics, rows_SI in zip(loaded.groups, loaded.statistics, more, strict=True):
        members = _members(loaded, group, statistics, plan, rows_SI)
        report, s_I = _smooth(work, group, members, options)
        statistics.rows_SI = None
        statistics.smooth_(s_I)
        if members is not None:
            members.measured_MI.div_(s_I)
            members.power_I.div_(s_I.square())
        reports.append(report)
        groups.append((members, s_I, report))
    for members, s_I, report in groups:
        if members is not None:
            _round(work, members, s_I, report)
            members.statistics.clear()
    in_order = [name for name in linears(loaded.module) if name in work.quantized]
    return BlockResult(
        quantized={name: work.quantized[name] for name in in_order},
        dense=dense_tensors(loaded.module, loaded.prefix, work.quantized, options.dtype),
        inputs={name: work.inputs[name] for name in in_order if name in work.inputs},
        report={"layers": [work.layers[name] for name in in_order], "groups": reports, **cache},
    )


def _members(
    loaded: LoadedBlock, group: Group, statistics: InputStatistics, plan: LayerPlan, more_SI: Tensor
) -> _Members | None:
    """None where every layer of the group stays dense. more_SI: tokens to measure on as well."""
    schemes = {name: plan[loaded.prefix + name] for name in group.layers if loaded.prefix + name in plan}
    names = [name for name, scheme in schemes.items() if not scheme.is_dense]
    if not names:
        return None
    different = {schemes[name] for name in names}
    if len(different) > 1:
        said = " and ".join(sorted(scheme.label() for scheme in different))
        raise ConfigError(
            f"{loaded.prefix}{', '.join(names)} share their inputs and are planned as {said}; they must have one scheme"
        )
    sampled_SI = statistics.rows_SI
    assert sampled_SI is not None
    measured_MI = sampled_SI[:: max(1, len(sampled_SI) // MEASURED_ROWS)]
    return _Members(
        group=group,
        names=names,
        scheme=different.pop(),
        statistics=statistics,
        power_I=sampled_SI.square().mean(dim=0),
        measured_MI=torch.cat([measured_MI, more_SI]) if len(more_SI) else measured_MI.clone(),
    )


def _check_rows(loaded: LoadedBlock) -> list[Tensor]:
    """Each group's inputs on the check rows, first tokens included: what is rare and huge sits there."""
    seen: list[Tensor] = [torch.empty(0)] * len(loaded.groups)

    def hook(index: int):  # type: ignore[no-untyped-def]
        def keep(_: object, args: tuple[Tensor, ...]) -> None:
            seen[index] = args[0].detach().float().reshape(-1, args[0].shape[-1])

        return keep

    handles = [
        loaded.module.get_submodule(group.layers[0]).register_forward_pre_hook(hook(i))
        for i, group in enumerate(loaded.groups)
    ]
    try:
        loaded.run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


# ---- smoothing -----------------------------------------------------------------------------------------


def _smooth(work: _Work, group: Group, members: _Members | None, options: Int8Options) -> tuple[dict[str, Any], Tensor]:
    """Search and fold one group's scale; its report, and the scale now in the weights' columns."""
    ones = torch.ones(group.in_features, device=work.current.device)
    report: dict[str, Any] = {
        "layers": list(group.layers),
        "fold": group.fold.producer if group.fold else None,
        "strength": 0.0,
        "descended": False,
        "note": group.reason,
    }
    if members is None:
        report["note"] = "every layer of the group is listed in --skip"
        return report, ones
    if group.fold is None or options.strength == 0:
        return report, ones
    choice = _search(work, members, group.fold.channels_share(), options)
    if choice.strength == 0 and not choice.descended:
        report["note"] = "no scale beat the identity"
        return report, ones
    folded, work.current = fold_proven(work.loaded, group, choice.s_I, work.row_scale, work.current, options.dtype)
    if folded is None:
        report["note"] = "the fold changed the block's output and was undone"
        return report, ones
    report.update(strength=choice.strength, descended=choice.descended)
    report["gain"] = float(f"{choice.error / max(choice.identity_error, 1e-30):.4g}")
    return report, folded


def _search(work: _Work, members: _Members, shared: Tensor, options: Int8Options) -> Smoothing:
    weights = [weight_OI(work.loaded.module.get_submodule(name)).float() for name in members.names]
    statistics = members.statistics
    assert statistics.rows_SI is not None
    return search_smoothing(
        weights,
        SampledInputs(
            gram_II=statistics.gram_II if options.feedback else None,
            power_I=members.power_I,
            amax_I=statistics.amax_I,
            rows_SI=statistics.rows_SI,
            measured_MI=members.searched_MI,
        ),
        members.scheme.input,
        lambda w_OI: int8.round_to_nearest(w_OI, members.weight, options.dtype),
        weight_share=FEEDBACK_SHARE if options.feedback else 1.0,
        shared=shared,
        strengths=STRENGTHS if options.strength is None else [options.strength],
    )


# ---- rounding ------------------------------------------------------------------------------------------


def _round(work: _Work, members: _Members, s_I: Tensor, report: Mapping[str, Any]) -> None:
    """Codes of the members, their inputs' ranges if static, and what they lose; into `work`."""
    modules = {name: work.loaded.module.get_submodule(name) for name in members.names}
    weights = {name: weight_OI(module).float().contiguous() for name, module in modules.items()}
    activation = members.scheme.input
    static = None
    if activation is not None and not activation.dynamic:
        stacked = torch.cat(list(weights.values()))
        static = fit_static(members.measured_MI, stacked, activation, work.options.dtype)
        for name in members.names:  # tensors of its own: a file holds each layer's
            work.inputs[name] = StaticInput(scale=static.scale.clone(), zero_point=static.zero_point.clone())
    seen_SI = _seen(members.measured_MI, activation, static)
    for names in stacks({name: w_OI.numel() for name, w_OI in weights.items()}):
        stack = {name: weights[name] for name in names}
        rows_O = torch.cat([work.row_scale.get(name, torch.ones(len(w), device=w.device)) for name, w in stack.items()])
        stacked_OI = torch.cat(list(stack.values()))
        target_OI, rounded = _rounded(stacked_OI, rows_O, members, seen_SI, work.options)
        errors = _errors(target_OI, rounded.dequantize(members.weight), s_I, rows_O, members, seen_SI)
        ends = list(accumulate(len(w) for w in stack.values()))
        for (name, w), end in zip(stack.items(), ends, strict=True):
            part = slice(end - len(w), end)
            layer = work.loaded.prefix + name
            found, lost = rounded.rows(part), errors.of(part, layer)
            if not work.options.allow_damage:
                refuse_damage(layer, lost["error"], lost["rtn_error"])
            work.quantized[name] = QuantizedWeight.from_parts(
                found.codes_OI, found.scale_OG, found.zero_point_OG, members.weight, work.options.dtype
            )
            work.layers[name] = {
                "layer": layer,
                **lost,
                "strength": report["strength"],
                "descended": report["descended"],
                "clip": round(float(found.factor_OG.mean()), 4),
            }


def _seen(rows_SI: Tensor, activation: ActivationScheme | None, static: StaticInput | None) -> Tensor:
    """The sampled tokens as the layer gets them."""
    return rows_SI if activation is None else activations.fake_quantize(rows_SI, activation, static)


def _rounded(
    w_OI: Tensor, rows_O: Tensor, members: _Members, seen_SI: Tensor, options: Int8Options
) -> tuple[Tensor, Rounded]:
    """The weight that is wanted behind inputs that are not rounded, and its codes."""
    statistics, scheme = members.statistics, members.weight
    if not options.feedback:
        return w_OI, _to_nearest(w_OI, members.power_I, scheme, options.dtype)
    noise = InputNoise.of(members.measured_MI, seen_SI)
    hessian_II = noise.with_noise(statistics.gram_II)
    inputs = int8.prepare(hessian_II, scheme, kept_share(len(hessian_II), statistics.num_tokens))
    del hessian_II
    shift_OI = statistics.target_shift(w_OI, rows_O)
    wanted_OI = w_OI if shift_OI is None else retarget(w_OI, shift_OI, inputs, STRENGTH)
    aimed_OI = retarget(wanted_OI, -w_OI * noise.seen_I, inputs, 1.0) if members.scheme.input else wanted_OI
    return wanted_OI, int8.round_with_feedback(aimed_OI, inputs, scheme, options.dtype)


def _to_nearest(w_OI: Tensor, power_I: Tensor, scheme: Scheme, dtype: torch.dtype) -> Rounded:
    w_OGg = numerics.to_groups(w_OI, scheme)
    scale_OG, factor_OG = int8.fit_scale(w_OGg, power_I, dtype)
    codes = (w_OGg / scale_OG.unsqueeze(-1)).round_().clamp_(-128, 127).add_(128)
    return Rounded(
        codes_OI=codes.to(torch.uint8).reshape(w_OI.shape),
        scale_OG=scale_OG,
        zero_point_OG=torch.full_like(scale_OG, 128.0),
        factor_OG=factor_OG,
        wanted_OI=None,
    )


# ---- what is lost --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Errors:
    """Mean squared outputs on the sampled tokens, and mean squared errors of them, by row of the weight; `[O]`.

    ours: of what the layer does now, weights and inputs as integers; inputs: of rounding the inputs alone; nearest: of
    everything rounded to nearest, without smoothing. Relative to the output of the wanted weight.
    """

    signal_O: Tensor
    ours_O: Tensor
    inputs_O: Tensor
    nearest_O: Tensor

    def of(self, rows: slice, layer: str) -> dict[str, float]:
        """Of one layer, relative to its own squared output. ArtifactError when they are not finite."""
        signal = float(self.signal_O[rows].sum(dtype=torch.float64))
        named = {"error": self.ours_O, "inputs_error": self.inputs_O, "rtn_error": self.nearest_O}
        return {
            key: relative_error(float(lost_O[rows].sum(dtype=torch.float64)), signal, layer)
            for key, lost_O in named.items()
        }


def _errors(
    wanted_OI: Tensor, made_OI: Tensor, s_I: Tensor, rows_O: Tensor, members: _Members, seen_SI: Tensor
) -> _Errors:
    """Of a stack of layers, on the sampled tokens. s_I: what is in the columns; rows_O: what rows were divided by."""
    x_SI = members.searched_MI
    seen_SI = seen_SI[:: len(seen_SI) // len(x_SI)]
    with numerics.tensor_float32():
        output_SO = x_SI @ wanted_OI.t()
        plain_OI = int8.round_to_nearest(wanted_OI / s_I, members.weight, torch.float32)
        plain_SI = _seen_plainly(x_SI * s_I, members.scheme.input)

        def lost_O(found_SO: Tensor) -> Tensor:
            return found_SO.sub_(output_SO).square_().mean(dim=0).mul_(rows_O.square())

        return _Errors(
            signal_O=output_SO.square().mean(dim=0).mul_(rows_O.square()),
            ours_O=lost_O(seen_SI @ made_OI.t()),
            inputs_O=lost_O(seen_SI @ wanted_OI.t()),
            nearest_O=lost_O(plain_SI @ plain_OI.t()),
        )


def _seen_plainly(rows_SI: Tensor, activation: ActivationScheme | None) -> Tensor:
    """The tokens without smoothing, quantized with the range that they have."""
    return rows_SI if activation is None else fake_quantized(rows_SI, activation)
