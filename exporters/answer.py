"""Can this model be made into that? One answer for `fit` and `export`, from config and shapes, before any work.

What a format's reader takes, its own room says (`edge.folder`, `genai.families`, `trt.graph.architecture`); what
`compress awq` can make, AutoAWQ's layout says; which INT8 a reader takes, its `Layout`. Nothing else decides, so what
is advised is what is accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from compress import advice, stage
from compress.artifact import parent_path, read_manifest
from compress.errors import ArtifactError, CompressError, UnsupportedError
from compress.formats import awq_gemm, compressed_tensors
from compress.linear import is_conv1d, linears
from compress.model import StreamedModel
from compress.plan import LayerPlan, LayerScheme
from compress.scheme import GROUP_SIZES, Scheme, dividing
from exporters.edge import folder as edge
from exporters.genai import families as genai
from exporters.hf.layout import LAYOUT as HF_LAYOUT
from exporters.reader import Layout, is_int8
from exporters.sizing.inventory import Model, read_model
from exporters.sizing.predict import Plan, native_kv_bits, size
from exporters.sizing.targets import Target
from exporters.trt.layout import LAYOUT as TRT_LAYOUT

# Tokens to advise where what was asked for leaves no room.
SHORTER = 2048

LAYOUTS: dict[str, Layout] = {
    "hf": HF_LAYOUT,
    "onnx": genai.LAYOUT,
    "onnx-trt": TRT_LAYOUT,
    "tensorrt": TRT_LAYOUT,
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
    elif format in ("onnx-trt", "tensorrt"):
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
        raise UnsupportedError(
            f"{path}: {conv} is a transformers Conv1D, which readers of quantized folders do not take"
        )
    if scheme.num_bits == 8:
        return compressed_tensors.check(plan, shapes)
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


def refuse_int8(
    path: Path, plan: LayerPlan, layout: Layout, format: str, target: Target | None = None, context: int = SHORTER
) -> None:
    """Raise UnsupportedError, with the command that makes what it takes, for INT8 that the format's reader does not.

    target: where the export is for, so that nothing is advised which does not work there.
    """
    for scheme, layers in plan.groups().items():
        if is_int8(scheme) and not layout.takes_int8(scheme):
            way = None if target is None else _instead(path, format, target, context, scheme, layout)
            raise UnsupportedError(
                f"{path}: {layers[0]} is {scheme.label()}, which readers of {format} do not take; "
                f"{way or f'this makes what they take: {_remade(path, scheme, layout)}'}"
            )


def refuse_mix(path: Path, plan: LayerPlan, format: str, target: Target) -> None:
    """Raise UnsupportedError for INT4 beside other codes where a graph is written, which holds one scheme of codes."""
    groups = plan.groups()
    if format == "hf" or len(groups) < 2 or all(is_int8(scheme) for scheme in groups):
        return
    said = " and ".join(scheme.label() for scheme in groups)
    way = advice.command("auto", _original(path), "--target", target.name, "--format", format)
    raise UnsupportedError(
        f"{path} mixes {said}, and {format} holds one scheme of codes; this chooses between it and float16: {way}"
    )


def _instead(path: Path, format: str, target: Target, context: int, scheme: LayerScheme, layout: Layout) -> str | None:
    """What works on the target instead, where the format could not hold the original in 4 bits either."""
    original = _original(path)
    if not isinstance(original, Path) or _words(scheme, layout)[0] != "awq":
        return None
    try:
        model = StreamedModel.outline(original)
        reason = refusal(model, format, context, codes_for(model, format))
    except CompressError:
        return None
    return reason and f"{reason}; {nearest(model, original, target, context, codes=True)}"


def _remade(path: Path, scheme: LayerScheme, layout: Layout) -> str:
    """The command that makes the nearest thing to `scheme` that the layout takes, of the artifact's own original."""
    first, *options = _words(scheme, layout)
    return advice.command(first, _original(path), *options)


def _words(scheme: LayerScheme, layout: Layout) -> list[str]:
    static = ["--static"] if all("static" in label for label in layout.w8a8) else []
    integers = ["int8", *static] if layout.w8a8 else None
    floats = ["int8", "--scheme", "w8a16"] if layout.w8_group_sizes is None or layout.w8_group_sizes else None
    int4 = ["awq", "--bits", "4", *(["--sym"] if layout.symmetric else [])]
    wanted = (integers, floats) if scheme.input is not None else (floats, integers)
    return next((words for words in wanted if words is not None), int4)


def _original(path: Path) -> Path | str:
    """What the artifact was made from, where that is known."""
    manifest = read_manifest(path)
    if manifest is None:
        return "MODEL"
    try:
        return parent_path(manifest.record["parent"], path)
    except (ArtifactError, KeyError):
        return "MODEL"


def codes_for(model: StreamedModel, format: str) -> Scheme:
    """The INT4 codes that `compress awq` would make of a full-precision model for this format's reader."""
    layout = LAYOUTS[format]
    _, inside = stage.names_of(model)
    plan = LayerPlan.uniform(inside, LayerScheme(weight=Scheme()))
    fitting = dividing(shape[1] for shape in stage.shapes_of(model, plan).values())
    taken = [s for s in fitting if layout.group_sizes is None or s in layout.group_sizes]
    size = (taken or list(layout.group_sizes or GROUP_SIZES))[0]
    return Scheme(num_bits=layout.num_bits[0], group_size=size, symmetric=layout.symmetric)


def held(model: StreamedModel, format: str) -> Scheme | None:
    """The codes that a folder's layers would have for the format; None for no codes, and for INT8, which stays."""
    schemes = [s for s in model.stored.exact_plan().groups() if s.weight is not None and not is_int8(s)]
    own = schemes[0].weight if schemes else None
    return None if own is None else LAYOUTS[format].wants(own) or own


def refusal(model: StreamedModel, format: str, context: int, scheme: Scheme | None) -> str | None:
    """Why `check` refuses it, or `refuse_int8` what the folder holds; in words, or None."""
    try:
        refuse_int8(model.checkpoint.path, model.stored.plan, LAYOUTS[format], format)
        check(model, format, context, scheme)
    except CompressError as e:
        return str(e)
    return None


def taker(model: StreamedModel) -> Callable[[Plan], bool]:
    """Whether a plan's format can hold the model with weights of the plan's bits (None: as they are)."""

    def takes(plan: Plan) -> bool:
        return refusal(model, plan.format, plan.context, _codes(model, plan)) is None

    return takes


def _codes(model: StreamedModel, plan: Plan) -> Scheme | None:
    if plan.num_bits is None:
        return held(model, plan.format)
    if plan.num_bits == 8:
        return Scheme(num_bits=8, group_size=-1, symmetric=True)
    return None if plan.num_bits >= 16 else codes_for(model, plan.format)


def ways(model: StreamedModel, target: Target, context: int) -> Iterator[Way]:
    """What can be made of the model for the target's readers, and fits its memory with one sequence of `context`.

    Formats in the target's order, quantized first.
    """
    sizes = read_model(model.checkpoint.path)
    for format in target.formats:
        schemes = [held(model, format)] if model.stored.layers else [codes_for(model, format), None]
        for scheme in schemes:
            if refusal(model, format, context, scheme) is None and _fits(sizes, format, scheme, context, target):
                yield Way(format=format, scheme=scheme)


def _fits(sizes: Model, format: str, scheme: Scheme | None, context: int, target: Target) -> bool:
    packed = sizes.scheme is not None
    bits = None if packed else 16 if scheme is None else scheme.num_bits
    group = 128 if scheme is None or scheme.group_size < 0 else scheme.group_size
    plan = Plan(format=format, context=context, num_bits=bits, group_size=group, kv_bits=native_kv_bits(format))
    return size(sizes, plan, target).fits


def nearest(model: StreamedModel, said: Path | str, target: Target, context: int, *, codes: bool | None = None) -> str:
    """The nearest thing that works on the target, as commands that run; or that nothing does.

    codes: only ways with (True) or without codes.
    """
    shorter = min(context, SHORTER)
    found = (
        (way, tokens)
        for tokens in dict.fromkeys((context, shorter))
        for way in ways(model, target, tokens)
        if codes is None or codes == (way.scheme is not None)
    )
    way, tokens = next(found, (None, context))
    if way is None:
        return f"no reader of {target.name} takes it in the memory that is there"
    usual = min(target.context, read_model(model.checkpoint.path).max_positions or target.context)
    asked = () if tokens == usual else ("--context", str(tokens))
    export = ("export", "--target", target.name, "--format", way.format, *asked)
    if way.scheme is None or model.stored.layers:
        return f"this works: {advice.command(*export[:1], said, *export[1:])}"
    codes_too = ("--sym",) if way.scheme.symmetric else ()  # so that what is judged is what ships
    return f"this works: {advice.command('awq', said, *codes_too)} and then {advice.command(*export)}"
