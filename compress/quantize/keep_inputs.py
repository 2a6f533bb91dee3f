"""Which linears of a W8A8 model keep their inputs as floats, because rounding those loses most.

Rounding inputs costs very different amounts from layer to layer: in Llama-like models the inputs of `down_proj`, a
product of two activations with rare huge values, lose ten times what others lose. Linears of one input are judged and
kept together, as engines that compute them as one matrix need. What counts is what is left after smoothing, so the
model is measured as it would be quantized, on some of its rows and without error feedback, before anything is written.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from compress.block import BlockResult, LoadedBlock
from compress.blocks import stream
from compress.errors import ConfigError
from compress.model import StreamedModel
from compress.plan import LayerPlan, LayerScheme
from compress.statistics import Wanted
from compress.tell import Tell

# Calibration rows that are measured on.
ROWS = 16
# `auto` keeps what loses so many times what the median group does.
AUTO_FACTOR = 4.0


def measure(
    model: StreamedModel,
    ids_NT: Tensor,
    method: Callable[[LoadedBlock], BlockResult],
    plan: LayerPlan,
    wanted: Wanted,
    tell: Tell,
) -> list[dict[str, Any]]:
    """Of each group of linears whose inputs are quantized: its layers' full names, and the error that rounding its
    inputs causes, relative to the output's own power, of the layer that loses most. JSON, in the model's order."""
    tell.start("measuring block", model.num_blocks)
    found: list[dict[str, Any]] = []
    for step in stream(model, ids_NT[:ROWS], _measuring(method), plan=plan, wanted=wanted, tell=tell):
        prefix = model.block_prefix(step.source)
        errors = {layer["layer"]: layer["inputs_error"] for layer in step.report["layers"]}
        for group in step.report["groups"]:
            names = [f"{prefix}{name}" for name in group["layers"] if f"{prefix}{name}" in errors]
            if names:
                found.append({"layers": names, "error": max(errors[name] for name in names)})
        tell.step(step.index + 1, found=step.report)
    return found


def _measuring(method: Callable[[LoadedBlock], BlockResult]) -> Callable[[LoadedBlock], BlockResult]:
    """The method's report, without anything that would be written."""

    def block(loaded: LoadedBlock) -> BlockResult:
        return BlockResult(quantized={}, dense={}, report=method(loaded).report)

    return block


def chosen(groups: Sequence[Mapping[str, Any]], keep: int | None) -> list[dict[str, Any]]:
    """The groups whose inputs stay floats, worst first: `keep` of them, or with None those that lose `AUTO_FACTOR`
    times what the median group loses. ConfigError where none would be left to quantize."""
    worst = sorted(groups, key=lambda group: -group["error"])
    if keep is not None:
        if keep >= len(worst):
            raise ConfigError(
                f"--keep-inputs {keep} keeps the inputs of all {len(worst)} groups of layers; use --scheme w8a16, or "
                "keep fewer"
            )
        return [dict(group) for group in worst[:keep]]
    typical = statistics.median(group["error"] for group in worst) if worst else 0.0
    return [dict(group) for group in worst if group["error"] > AUTO_FACTOR * typical]


def kept(plan: LayerPlan, groups: Sequence[Mapping[str, Any]]) -> LayerPlan:
    """The plan with the inputs of these groups' layers as they are, weights in their scheme."""
    layers = dict(plan.layers)
    for name in (name for group in groups for name in group["layers"]):
        layers[name] = LayerScheme(weight=layers[name].weight)
    return LayerPlan(layers, plan.kv)
