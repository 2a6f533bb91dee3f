"""Can this model be made into that? One answer for `fit` and `export`, from config and shapes, before any work.

What a format's reader takes, its own room says (`edge.folder`, `genai.families`, `trt.graph.architecture`); what
`compress awq` can make, AutoAWQ's layout says. Nothing else decides, so what is advised is what is accepted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from compress import advice, stage
from compress.errors import CompressError, UnsupportedError
from compress.formats import awq_gemm
from compress.linear import is_conv1d, linears
from compress.model import StreamedModel
from compress.plan import LayerPlan, LayerScheme
from compress.scheme import GROUP_SIZES, Scheme, dividing
from exporters.edge import folder as edge
from exporters.genai import families as genai
from exporters.reader import Layout
from exporters.sizing.targets import Target
from exporters.trt.layout import LAYOUT as TRT_LAYOUT

LAYOUTS: dict[str, Layout] = {
    "hf": Layout(num_bits=(4,), group_sizes=GROUP_SIZES),
    "onnx": genai.LAYOUT,
    "onnx-trt": TRT_LAYOUT,
    "edge": edge.LAYOUT,
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """Something that can be made of a model: the format, and the codes of its weights (None: no codes)."""

    format: str
    scheme: Scheme | None


def check(model: StreamedModel, format: str, context: int, scheme: Scheme | None) -> None:
    """Raise CompressError, with the reason, when `format` cannot hold the model with its layers in `scheme`.

    scheme None: not quantized. Layers that the folder left in floating point stay so.
    """
    path, config = model.checkpoint.path, model.checkpoint.config
    if format == "edge":
        edge.check_config(path, config, context)
    elif format == "onnx":
        genai.check_config(path, config)
    elif format == "onnx-trt":
        from exporters.trt.graph import architecture  # needs onnx, and says so

        architecture.read(model)
    if scheme is None:
        return
    _, inside = stage.names_of(model)
    kept = set(model.stored.layers) or set(inside)
    plan = LayerPlan({name: LayerScheme(weight=scheme) for name in inside if name in kept})
    shapes = stage.shapes_of(model, plan)
    conv = next((n for b in model.blocks for n, m in linears(b).items() if is_conv1d(m)), None)
    if conv is not None:
        raise UnsupportedError(f"{path}: {conv} is a transformers Conv1D, which AutoAWQ readers do not take")
    sizes = LAYOUTS[format].group_sizes
    other = next((n for n in plan if shapes[n][1] % scheme.group_size), None)
    if other is not None and sizes is not None and len(sizes) == 1:
        raise UnsupportedError(
            f"{path}: {format}'s INT4 product takes groups of {sizes[0]} only, which do not divide the "
            f"{shapes[other][1]} inputs of {other}"
        )
    awq_gemm.check(plan, shapes)
    if format == "edge":
        edge.check_rows(path, config, shapes)


def codes_for(model: StreamedModel, format: str) -> Scheme:
    """The INT4 codes that `compress awq` would make of a full-precision model for this format's reader."""
    layout = LAYOUTS[format]
    _, inside = stage.names_of(model)
    plan = LayerPlan.uniform(inside, LayerScheme(weight=Scheme()))
    fitting = dividing(shape[1] for shape in stage.shapes_of(model, plan).values())
    taken = [s for s in fitting if layout.group_sizes is None or s in layout.group_sizes]
    size = (taken or list(layout.group_sizes or GROUP_SIZES))[0]
    return Scheme(num_bits=layout.num_bits[0], group_size=size, symmetric=layout.symmetric)


def refusal(model: StreamedModel, format: str, context: int, scheme: Scheme | None) -> str | None:
    """Why `check` refuses, in words, or None."""
    try:
        check(model, format, context, scheme)
    except CompressError as e:
        return str(e)
    return None


def ways(model: StreamedModel, target: Target, context: int) -> Iterator[Way]:
    """What can be made of the model for the target's readers: formats in the target's order, quantized first."""
    for format in target.formats:
        held = model.stored.plan.groups()
        schemes: list[Scheme | None]
        if held:
            own = next(iter(held)).weight
            schemes = [None if own is None else LAYOUTS[format].wants(own) or own]
        else:
            schemes = [codes_for(model, format), None]
        for scheme in schemes:
            if refusal(model, format, context, scheme) is None:
                yield Way(format=format, scheme=scheme)


def nearest(model: StreamedModel, said: Path | str, target: Target, context: int, *, codes: bool | None = None) -> str:
    """The nearest thing that works on the target, as commands that run; or that nothing does.

    codes: only ways with (True) or without codes.
    """
    way = next((w for w in ways(model, target, context) if codes is None or codes == (w.scheme is not None)), None)
    if way is None:
        return f"no reader of {target.name} takes it"
    export = ("export", "--target", target.name, "--format", way.format)
    if way.scheme is None or model.stored.layers:
        return f"this works: {advice.command(*export[:1], said, *export[1:])}"
    return f"this works: {advice.command('awq', said)} and then {advice.command(*export)}"
