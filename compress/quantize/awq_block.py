"""How one loaded block is quantized: search, confirm, fold, prove, round, and with `best` tune.

The algorithms are in files of their own (`awq`, `retarget`, `feedback`, `refit`, `tune`); this file only applies them
to a block in the right order. What each effort does, and why, is in METHODS.md:

    fast      AWQ scales; rounded with error feedback; scales refitted
    balanced  AWQ scales where error feedback profits; retargeted; rounded with error feedback; scales refitted
    best      the same, then codes, scales and norms tuned on the block's output
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from compress import distributed, numerics
from compress.block import BlockResult, LoadedBlock
from compress.errors import ConfigError
from compress.groups import Group
from compress.linear import is_linear, linears, parameter, set_weight_OI, weight_OI
from compress.plan import LayerPlan
from compress.quantize import awq
from compress.quantize.damage import refuse_damage, refuse_drowning, relative_error
from compress.quantize.feedback import Prepared, Rounded, prepare, round_with_feedback
from compress.quantize.folding import fold_proven
from compress.quantize.lift import lift_of, room_of
from compress.quantize.refit import refit_scales
from compress.quantize.retarget import retarget
from compress.quantize.sharing import Errors, Run, Scaled, exchanged, runs_of, sent
from compress.quantize.stored import dense_tensors
from compress.quantize.tune import TuneOptions, tune_block
from compress.quantized import QuantizedWeight
from compress.scheme import Scheme
from compress.statistics import InputStatistics, kept_share

# What the field's AWQ readers expect of everything that is not packed.
STORE_DTYPE = torch.float16
EFFORTS = ("fast", "balanced", "best")
# Rows that a scale is tried on with error feedback.
CONFIRM_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class AwqOptions:
    """Choices of the method. scheme: of a layer that is asked about without a plan.

    allow_damage: go on when a layer's output is mostly error (`damage`), instead of stopping.
    """

    scheme: Scheme
    effort: str = "balanced"
    smooth: bool = True
    allow_damage: bool = False
    tune: TuneOptions = TuneOptions()

    def __post_init__(self) -> None:
        if self.effort not in EFFORTS:
            raise ConfigError(f"effort {self.effort!r} is not one of {', '.join(EFFORTS)}; choose one of these")

    @property
    def confirms_with_feedback(self) -> bool:
        """Whether a scale is weighed against none by what error feedback loses, and not by the true forward."""
        return self.effort != "fast"

    @property
    def paths(self) -> int:
        """Of hidden states, that the method must be given (`blocks.stream`); with one, nothing is retargeted."""
        return 1 if self.effort == "fast" else 2


def awq_block(loaded: LoadedBlock, plan: LayerPlan, options: AwqOptions) -> BlockResult:
    """Quantize the block's layers that the plan quantizes; see the module docstring. Changes the loaded weights."""
    layers = linears(loaded.module)
    schemes = planned_schemes(loaded, plan)
    chosen = list(schemes)
    if not options.allow_damage:
        for name in chosen:
            refuse_drowning(loaded.prefix + name, weight_OI(layers[name]))
    runs = runs_of(loaded, chosen)
    signals = {
        name: awq.output_error(weight_OI(layers[name]).float(), statistics.gram_II)
        for name, statistics in _inputs(loaded, [n for run in runs if run.is_mine for n in run.names])
    }
    row_scale: dict[str, Tensor] = {}
    group_reports = []
    scales = []
    prepared: list[Prepared | None] = [None] * len(loaded.groups)
    current = loaded.check_output
    ahead = _scales_ahead(loaded, runs, schemes, prepared, options)
    for i, (group, statistics) in enumerate(zip(loaded.groups, loaded.statistics, strict=True)):
        members = [name for name in group.layers if name in chosen]
        mine = replace(options, scheme=schemes[members[0]]) if members else options
        if prepared[i] is None and _needs_preparing(i, runs, ahead):
            prepared[i] = _prepared(group, statistics, mine)
        report, s_I, current = _smooth(
            loaded, group, statistics, members, prepared[i], mine, row_scale, current, ahead.get(i)
        )
        group_reports.append(report)
        scales.append(s_I)
    rounded, errors = _round_groups(loaded, runs, schemes, scales, prepared, row_scale, options)
    rounded, errors, signals = exchanged(runs, layers, schemes, rounded, errors, signals)
    relative = {name: _judged(loaded.prefix + name, errors[name], signals[name], options) for name in chosen}
    block_report: dict[str, Any] = {}
    if options.effort == "best" and rounded:
        assert len(set(schemes.values())) == 1, "tuning takes one scheme a block"
        rounded, block_report = _tuned(loaded, rounded, replace(options, scheme=schemes[chosen[0]]))
    ratio_of = {name: g["ratio"] for g in group_reports for name in g["layers"]}
    layer_reports = [
        {
            "layer": loaded.prefix + name,
            **relative[name],
            "ratio": ratio_of[name],
            "clip": round(numerics.mean_of(rounded[name].factor_OG), 4),
        }
        for name in chosen
    ]
    quantized = {name: _packed(rounded[name], schemes[name]) for name in chosen}
    dense = dense_tensors(loaded.module, loaded.prefix, quantized, STORE_DTYPE)
    report = {"layers": layer_reports, "groups": group_reports, **block_report}
    return BlockResult(quantized=quantized, dense=dense, report=report)


def planned_schemes(loaded: LoadedBlock, plan: LayerPlan) -> dict[str, Scheme]:
    """What the weight of each planned layer of the block becomes, by its name there, in the block's order.

    Linears of one input are rounded together, and engines compute them as one matrix: ConfigError when their schemes
    differ.
    """
    found = {name: plan[loaded.prefix + name].weight for name in linears(loaded.module)}
    schemes = {name: scheme for name, scheme in found.items() if scheme is not None}
    for group in loaded.groups:
        names = [name for name in group.layers if name in schemes]
        if len({schemes[name] for name in names}) > 1:
            said = " and ".join(sorted({schemes[name].label() for name in names}))
            raise ConfigError(
                f"{loaded.prefix}{', '.join(names)} share their inputs and are planned as {said}; they must have one "
                "scheme"
            )
    return schemes


def _judged(layer: str, errors: Errors, signal: float, options: AwqOptions) -> dict[str, float]:
    """The layer's errors relative to its squared output; raises for a layer that would be destroyed."""
    error = relative_error(errors.rounded, signal, layer)
    rtn_error = relative_error(errors.to_nearest, signal, layer)
    if not options.allow_damage:
        refuse_damage(layer, error, rtn_error)
    return {"error": error, "rtn_error": rtn_error}


def _inputs(loaded: LoadedBlock, names: Sequence[str]) -> list[tuple[str, InputStatistics]]:
    return [
        (name, statistics)
        for group, statistics in zip(loaded.groups, loaded.statistics, strict=True)
        for name in group.layers
        if name in names
    ]


def _smooth(
    loaded: LoadedBlock,
    group: Group,
    statistics: InputStatistics,
    members: Sequence[str],
    inputs: Prepared | None,
    options: AwqOptions,
    row_scale: dict[str, Tensor],
    current: Tensor,
    found: Scaled | None = None,
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Search, confirm and fold one group's scale.

    `current` is the block's output on the check batch with the weights as they are. found: what the search gives, if it
    is known. Returns the group's report, the scale now in the weights' columns, and the output after the fold.
    """
    now_I = torch.ones(group.in_features, device=statistics.gram_II.device)
    report: dict[str, Any] = {
        "layers": list(group.layers),
        "fold": group.fold.producer if group.fold else None,
        "ratio": 0.0,
        "duo": False,
        "note": group.reason,
    }
    if group.fold is None or not members or not options.smooth:
        if not members:
            report["note"] = "every layer of the group is listed in --skip"
        return report, now_I, current
    modules = [loaded.module.get_submodule(name) for name in members]
    lifted, current = _lift(loaded, group, modules, options.scheme, row_scale, current)
    if lifted is not None:
        report["lift"] = float(lifted.median())
        now_I = lifted
    found = found or _search(loaded, group, statistics, modules, inputs, options)
    if found.is_identity:
        report["note"] = "no scale beat the identity"
        return report, now_I, current
    if not found.preferred:
        said = "error feedback" if options.confirms_with_feedback else "the true forward"
        report["note"] = f"{said} preferred the identity to the scale found"
        return report, now_I, current
    folded, after = fold_proven(loaded, group, found.s_I, row_scale, current, STORE_DTYPE)
    if folded is None:
        report["note"] = "the fold changed the block's output and was undone"
        return report, now_I, current
    report.update(ratio=found.ratio, duo=found.duo)
    return report, now_I * folded, after


def _search(
    loaded: LoadedBlock,
    group: Group,
    statistics: InputStatistics,
    modules: Sequence[nn.Module],
    inputs: Prepared | None,
    options: AwqOptions,
) -> Scaled:
    """The scale found for a group, and whether it is preferred to none."""
    assert group.fold is not None
    # A copy: the true forwards below overwrite the live weights, and `.float()` of float32 is no copy.
    weights = [weight_OI(m).float().clone() for m in modules]
    choice = awq.search_scale(
        weights, statistics.gram_II, statistics.magnitude_I, options.scheme, group.fold.channels_share()
    )
    if choice.ratio == 0 and not choice.duo:
        preferred = False
    elif options.confirms_with_feedback:
        assert inputs is not None
        preferred = _feedback_prefers(weights, statistics.gram_II, inputs, choice.s_I, options.scheme)
    else:
        preferred = _forward_prefers(loaded, modules, weights, choice.s_I, options.scheme)
    return Scaled(s_I=choice.s_I, ratio=choice.ratio, duo=choice.duo, preferred=preferred)


def _scales_ahead(
    loaded: LoadedBlock,
    runs: Sequence[Run],
    schemes: Mapping[str, Scheme],
    prepared: list[Prepared | None],
    options: AwqOptions,
) -> dict[int, Scaled]:
    """Of several processes: the groups' scales, each searched in the process that rounds the group's first layers.

    Only where no search depends on what is folded before it, so that each finds what it would find in its turn: none of
    a group's layers is divided by an earlier group's scale, and none is lifted. Fills `prepared` of this process's own.
    """
    if not distributed.running() or not options.confirms_with_feedback or not options.smooth:
        return {}
    layers = linears(loaded.module)
    owners = {run.group: run.owner for run in reversed(runs)}
    folding = [i for i in owners if loaded.groups[i].fold is not None]
    members = {i: [name for name in loaded.groups[i].layers if name in schemes] for i in owners}
    producers: set[str] = set()
    for i in sorted(folding):
        fold = loaded.groups[i].fold
        assert fold is not None
        scheme = schemes[members[i][0]]
        if producers & {*members[i]} or lift_of([weight_OI(layers[n]).float() for n in members[i]], scheme) != 1.0:
            return {}
        producers.add(fold.producer)
    own: dict[int, Scaled] = {}
    for i in sorted(folding):
        if owners[i] == distributed.rank():
            mine = replace(options, scheme=schemes[members[i][0]])
            group, statistics = loaded.groups[i], loaded.statistics[i]
            prepared[i] = _prepared(group, statistics, mine)
            modules = [loaded.module.get_submodule(name) for name in members[i]]
            own[i] = _search(loaded, group, statistics, modules, prepared[i], mine)
    return {i: sent(own.get(i), loaded.statistics[i].magnitude_I, owners[i]) for i in sorted(folding)}


def _needs_preparing(group: int, runs: Sequence[Run], ahead: Mapping[int, Scaled]) -> bool:
    """Whether this process searches the group's scale, or rounds some of its layers."""
    mine = [run for run in runs if run.group == group]
    return bool(mine) and (group not in ahead or any(run.is_mine for run in mine))


def _prepared(group: Group, statistics: InputStatistics, options: AwqOptions) -> Prepared:
    return prepare(statistics.gram_II, options.scheme, kept_share(group.in_features, statistics.num_tokens))


def _lift(
    loaded: LoadedBlock,
    group: Group,
    modules: Sequence[nn.Module],
    scheme: Scheme,
    row_scale: dict[str, Tensor],
    current: Tensor,
) -> tuple[Tensor | None, Tensor]:
    """Fold a power of two into weights that lie below what a scale can hold; None where there is no need or no way.

    Returns the factors now in the columns, and the block's output with the weights as they then are.
    """
    assert group.fold is not None
    lift = lift_of([weight_OI(m).float() for m in modules], scheme)
    if lift == 1.0:
        return None, current
    producer = loaded.module.get_submodule(group.fold.producer)
    weight = weight_OI(producer) if is_linear(producer) else parameter(producer, "weight") + group.fold.offset
    lift = min(lift, room_of(weight.float(), scheme))
    if lift == 1.0:
        return None, current
    lift_I = torch.full((group.in_features,), lift, device=current.device)
    return fold_proven(loaded, group, lift_I, row_scale, current, STORE_DTYPE)


def _forward_prefers(
    loaded: LoadedBlock, modules: Sequence[nn.Module], weights: Sequence[Tensor], s_I: Tensor, scheme: Scheme
) -> bool:
    """Whether the block's output, with these layers rounded to nearest, is nearer its own with the scale than without.

    The paper's own criterion is the error of the parent's output; this is that of the block, for two candidates.
    """
    errors = []
    for s in (s_I, torch.ones_like(s_I)):
        for module, w_OI in zip(modules, weights, strict=True):
            set_weight_OI(module, numerics.round_to_nearest(w_OI * s, scheme) / s)
        # Ranks two candidates: with the linears' inputs rounded to TF32 on a CPU, none of 24 choices on the reference
        # model and none of 119 on SmolLM2-135M became another.
        with numerics.tensor_float32():
            errors.append(numerics.mean_of((loaded.run() - loaded.check_output).square()))
    for module, w_OI in zip(modules, weights, strict=True):
        set_weight_OI(module, w_OI)
    return errors[0] < errors[1]


def _feedback_prefers(
    weights: Sequence[Tensor], gram_II: Tensor, inputs: Prepared, s_I: Tensor, scheme: Scheme
) -> bool:
    """Whether a sample of rows loses less to rounding *with error feedback* under the scale than without it.

    Error feedback makes up for much of what a scale is for, so the two must be weighed together.
    """
    rows = awq.sampled_rows(torch.cat(list(weights)), CONFIRM_ROWS)
    errors = []
    for s in (s_I, torch.ones_like(s_I)):
        found = round_with_feedback(rows * s, inputs.scaled(s), scheme, wanted=False)
        errors.append(awq.output_error(found.dequantize(scheme).div_(s).sub_(rows), gram_II))
    return errors[0] < errors[1]


def _round_groups(
    loaded: LoadedBlock,
    runs: Sequence[Run],
    schemes: Mapping[str, Scheme],
    scales: Sequence[Tensor],
    prepared: list[Prepared | None],
    row_scale: Mapping[str, Tensor],
    options: AwqOptions,
) -> tuple[dict[str, Rounded], dict[str, Errors]]:
    """Codes of every layer of this process's runs, and its squared output error against what it was rounded from.

    Errors are those of the layer as it was before anything was folded into it (`row_scale`). Uses up the statistics and
    `prepared`: a wide layer's are gigabytes, and gone before the next layer's turn.
    """
    layers = linears(loaded.module)
    rounded: dict[str, Rounded] = {}
    errors: dict[str, Errors] = {}
    for i, (statistics, s_I) in enumerate(zip(loaded.statistics, scales, strict=True)):
        inputs, prepared[i] = prepared[i], None
        mine = [run.names for run in runs if run.group == i and run.is_mine]
        if mine:
            statistics.smooth_(s_I)
        for names in mine:
            assert inputs is not None
            weights = {name: weight_OI(layers[name]).float().contiguous() for name in names}
            found, lost = _round(
                weights, inputs.scaled(s_I), statistics, s_I, row_scale, replace(options, scheme=schemes[names[0]])
            )
            rounded.update(found)
            errors.update(lost)
        statistics.clear()
    return rounded, errors


def _round(
    weights: Mapping[str, Tensor],
    inputs: Prepared,
    statistics: InputStatistics,
    s_I: Tensor,
    row_scale: Mapping[str, Tensor],
    options: AwqOptions,
) -> tuple[dict[str, Rounded], dict[str, Errors]]:
    """Codes and errors (see `_round_groups`) of some layers of one group, in whose columns s_I already is."""
    rows = {name: row_scale.get(name, torch.ones(len(w), device=w.device)) for name, w in weights.items()}
    stacked = torch.cat(list(weights.values()))
    shift_OI = statistics.target_shift(stacked, torch.cat(list(rows.values())))
    if shift_OI is not None:
        stacked = retarget(stacked, shift_OI, inputs)
        del shift_OI
    rounded = _round_with_feedback(stacked, weights, inputs, statistics, options)
    errors = {}
    for name, w_OI in _split(stacked, weights).items():
        made = rounded[name].dequantize(options.scheme)
        plain = numerics.round_to_nearest(w_OI / s_I, options.scheme).mul_(s_I)
        ours, nearest = (
            awq.output_error(other_OI.sub_(w_OI).mul_(rows[name].unsqueeze(1)), statistics.gram_II)
            for other_OI in (made, plain)
        )
        errors[name] = Errors(rounded=ours, to_nearest=nearest)
    return rounded, errors


def _round_with_feedback(
    stacked_OI: Tensor, layers: Mapping[str, Tensor], inputs: Prepared, statistics: InputStatistics, options: AwqOptions
) -> dict[str, Rounded]:
    """Codes of a stack of layers with error feedback, scales refitted; given back to the layers."""
    scheme = options.scheme
    found = round_with_feedback(stacked_OI, inputs, scheme, wanted=options.effort == "best")
    scale_OG = refit_scales(found, stacked_OI, statistics.gram_II, scheme, inputs.off_diagonal)
    found = replace(found, scale_OG=scale_OG)
    ends = list(accumulate(len(w) for w in layers.values()))
    return {name: found.rows(slice(end - len(w), end)) for (name, w), end in zip(layers.items(), ends, strict=True)}


def _split(stacked: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows of a stack of layers, given back to the layers."""
    return dict(zip(like, stacked.split([len(w) for w in like.values()]), strict=True))


def _tuned(
    loaded: LoadedBlock, rounded: Mapping[str, Rounded], options: AwqOptions
) -> tuple[dict[str, Rounded], dict[str, Any]]:
    """The layers after tuning, the block's norms set to theirs, and the block's part of the report."""
    names = {f"{name}.weight": name for name in rounded}
    module = loaded.module
    norms = {
        f"{name}.weight": parameter(m, "weight")
        for name, m in module.named_modules()
        if not is_linear(m) and m._parameters.get("weight") is not None and parameter(m, "weight").ndim == 1
    }
    inputs_NTH = torch.cat(loaded.inputs)
    with numerics.repeatable(inputs_NTH.device):
        tuned = tune_block(
            {full: rounded[name] for full, name in names.items()},
            norms,
            loaded.forward,
            inputs_NTH,
            torch.cat(loaded.targets),
            options.scheme,
            options.tune,
        )
    for name, value in tuned.norms.items():
        norms[name].copy_(value)
    before, after = (float(f"{e:.6g}") for e in tuned.errors)
    said: dict[str, Any] = {"held_out_error": before, "held_out_error_tuned": after, "kept": tuned.kept}
    if tuned.said:
        said["slower"] = "; ".join(tuned.said)
    return {names[full]: r for full, r in tuned.layers.items()}, {"tuning": said}


def _packed(rounded: Rounded, scheme: Scheme) -> QuantizedWeight:
    return QuantizedWeight.from_parts(rounded.codes_OI, rounded.scale_OG, rounded.zero_point_OG, scheme)
