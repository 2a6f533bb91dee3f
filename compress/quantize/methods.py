"""How one loaded block is quantized with AWQ: search, confirm, fold, prove, fit ranges, round.

The algorithms are in `awq.py`; this file only applies them to a block in the right order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress import numerics
from compress.blocks import BlockResult, LoadedBlock
from compress.errors import ArtifactError
from compress.groups import Group, apply_fold, output_unchanged, restore, scale_columns
from compress.model import is_linear, linears, set_weight_OI, skipped, weight_OI
from compress.quantize import awq
from compress.quantized import QuantizedWeight
from compress.scheme import Scheme
from compress.statistics import InputStatistics

# What the field's AWQ readers expect of everything that is not packed.
STORE_DTYPE = torch.float16


@dataclass(frozen=True, kw_only=True)
class AwqOptions:
    """Choices of the AWQ method. skip: glob patterns of layers to leave in float16."""

    scheme: Scheme
    skip: tuple[str, ...] = ()
    smooth: bool = True
    clip: bool = True


def awq_block(loaded: LoadedBlock, options: AwqOptions) -> BlockResult:
    """Quantize one block; see the module docstring. Changes the loaded weights."""
    scheme = options.scheme
    layers = linears(loaded.module)
    chosen = [name for name in layers if not skipped(loaded.prefix + name, options.skip)]
    plain = {name: _plain_error(layers[name], stats, scheme) for name, stats in _inputs(loaded, chosen)}
    row_scale: dict[str, Tensor] = {}
    column_scale: dict[str, Tensor] = {}
    group_reports = []
    current = loaded.check_output
    for group, statistics in zip(loaded.groups, loaded.statistics, strict=True):
        members = [name for name in group.layers if name in chosen]
        report, s_I, current = _smooth(loaded, group, statistics, members, options, row_scale, current)
        group_reports.append(report)
        for name in members:
            column_scale[name] = s_I
    quantized: dict[str, QuantizedWeight] = {}
    layer_reports = []
    by_layer = dict(_inputs(loaded, chosen))
    ratio_of = {name: g["ratio"] for g in group_reports for name in g["layers"]}
    for name in chosen:
        w_OI = weight_OI(layers[name]).float().contiguous()
        gram_II = by_layer[name].smoothed(column_scale[name])
        quantized[name], factor = _round(w_OI, gram_II, options)
        delta = quantized[name].dequantize().to(w_OI.device) - w_OI
        if name in row_scale:  # errors are reported for the layer as it was before anything was folded into it
            delta *= row_scale[name].unsqueeze(1)
        layer_reports.append(
            {
                "layer": loaded.prefix + name,
                "error": _relative(awq.output_error(delta, gram_II), plain[name].signal),
                "rtn_error": _relative(plain[name].rtn, plain[name].signal),
                "ratio": ratio_of[name],
                "clip": round(float(factor.mean()), 4),
            }
        )
    dense = _stored_dense(loaded, quantized)
    return BlockResult(quantized=quantized, dense=dense, report={"layers": layer_reports, "groups": group_reports})


@dataclass(frozen=True, kw_only=True)
class _Plain:
    """Squared output of a layer and squared error of plain round-to-nearest, on the calibration inputs."""

    signal: float
    rtn: float


def _inputs(loaded: LoadedBlock, names: Sequence[str]) -> list[tuple[str, InputStatistics]]:
    return [
        (name, statistics)
        for group, statistics in zip(loaded.groups, loaded.statistics, strict=True)
        for name in group.layers
        if name in names
    ]


def _plain_error(module: nn.Module, statistics: InputStatistics, scheme: Scheme) -> _Plain:
    w_OI = weight_OI(module).float()
    delta = numerics.round_to_nearest(w_OI, scheme).sub_(w_OI)
    return _Plain(signal=awq.output_error(w_OI, statistics.gram_II), rtn=awq.output_error(delta, statistics.gram_II))


def _relative(error: float, signal: float) -> float:
    """Error power over signal power, with enough digits to be read and few enough to be stable."""
    return float(f"{max(0.0, error) / max(signal, 1e-30):.6g}")


def _smooth(
    loaded: LoadedBlock,
    group: Group,
    statistics: InputStatistics,
    members: Sequence[str],
    options: AwqOptions,
    row_scale: dict[str, Tensor],
    current: Tensor,
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Search, confirm and fold one group's scale.

    `current` is the block's output on the check batch with the weights as they are. Returns the group's report, the
    scale now in the weights' columns, and the output after the fold.
    """
    ones = torch.ones(group.in_features, device=statistics.gram_II.device)
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
        return report, ones, current
    modules = [loaded.module.get_submodule(name) for name in members]
    # A copy: the true forwards below overwrite the live weights, and `.float()` of float32 is no copy.
    weights = [weight_OI(m).float().clone() for m in modules]
    choice = awq.search_scale(
        weights, statistics.gram_II, statistics.magnitude_I, options.scheme, group.fold.channels_share()
    )
    if choice.ratio == 0 and not choice.duo:
        report["note"] = "no scale beat the identity"
        return report, ones, current
    errors = {}
    for label, s_I in (("chosen", choice.s_I), ("identity", ones)):
        for module, w_OI in zip(modules, weights, strict=True):
            set_weight_OI(module, numerics.round_to_nearest(w_OI * s_I, options.scheme) / s_I)
        errors[label] = float((loaded.run() - loaded.check_output).square().mean())
    for module, w_OI in zip(modules, weights, strict=True):
        set_weight_OI(module, w_OI)
    if not errors["chosen"] < errors["identity"]:
        report["note"] = "the true forward preferred the identity to the scale found"
        return report, ones, current
    folded, after = _fold(loaded, group, choice.s_I, row_scale, current)
    if folded is None:
        report["note"] = "the fold changed the block's output and was undone"
        return report, ones, current
    report.update(ratio=choice.ratio, duo=choice.duo)
    return report, folded, after


def _fold(
    loaded: LoadedBlock, group: Group, s_I: Tensor, row_scale: dict[str, Tensor], before: Tensor
) -> tuple[Tensor | None, Tensor]:
    """Apply the fold, prove that the block still computes the same, or put everything back and return None.

    Also returns the block's output with the weights as they then are.
    """
    assert group.fold is not None
    module = loaded.module
    kept = {
        name: {key: p.data.clone() for key, p in module.get_submodule(name)._parameters.items() if p is not None}
        for name in {group.fold.producer, *group.layers}
    }
    actual = apply_fold(module, group.fold, s_I, STORE_DTYPE)
    for name in group.layers:
        scale_columns(module.get_submodule(name), actual)
    after = loaded.run()
    if output_unchanged(before, after, loaded.check_input):
        producer = module.get_submodule(group.fold.producer)
        if is_linear(producer):
            rows = torch.ones(weight_OI(producer).shape[0], device=actual.device)
            rows[group.fold.rows.to(actual.device)] = actual
            row_scale[group.fold.producer] = rows
        return actual, after
    restore(module, kept)
    return None, before


def _round(w_OI: Tensor, gram_II: Tensor, options: AwqOptions) -> tuple[QuantizedWeight, Tensor]:
    """Codes of a weight, and the factors its ranges were shrunk by."""
    scheme = options.scheme
    steps = awq.CLIP_STEPS if options.clip else 0
    scale, zero, factor = (
        awq.search_range(w_OI, gram_II, scheme)
        if steps
        else (
            *numerics.scale_and_zero(*numerics.range_of(numerics.to_groups(w_OI, scheme)), scheme),
            torch.ones(1),
        )
    )
    q = numerics.quantize(numerics.to_groups(w_OI, scheme), scale, zero, scheme)
    return QuantizedWeight.from_parts(q, scale, zero, scheme), factor


def _stored_dense(loaded: LoadedBlock, quantized: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
    """Every other tensor of the block as the file will hold it. Raises ArtifactError when float16 cannot."""
    taken = {f"{name}.weight" for name in quantized}
    return {
        name: to_stored(value, loaded.prefix + name)
        for name, value in loaded.module.state_dict().items()
        if name not in taken
    }


def to_stored(value: Tensor, name: str) -> Tensor:
    """A tensor in float16 (integers unchanged). Raises ArtifactError for values that float16 cannot hold."""
    if not value.is_floating_point():
        return value.clone()
    stored = value.to(STORE_DTYPE)
    if not bool(torch.isfinite(stored).all()):
        largest = float(value.abs().max())
        reason = "is not finite" if math.isnan(largest) else f"reaches {largest:.4g}, beyond float16's 65504"
        raise ArtifactError(f"tensor {name} {reason}; AutoAWQ folders hold float16, so this model cannot be one")
    return stored
