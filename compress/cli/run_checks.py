"""What each step of a recipe will refuse, found before the first one starts: the commands' own checks, on folders that
have the config and headers of what is not made yet (`compress.foreseen`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cli.recipe_steps import Planned
from compress.errors import ConfigError, UnsupportedError
from compress.plan import LayerPlan

if TYPE_CHECKING:
    from compress.request import CalibratedRequest
    from compress.stage import Stage
    from compress.workspace import Source


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """What a step will make. bytes: of its weights, or of the export on disk. memory: the run's peak on the target, or
    of training here, at least. note: what cannot be known before."""

    bytes: int | None = None
    memory: int | None = None
    note: str = ""


Params = Mapping[str, Any]
Check = Callable[[Params, "Source", Path], Foreseen]


def foresee(step: Planned, takes: Path, folder: Path) -> Foreseen:
    """Raise CompressError for what the step would refuse of the model in `takes`; write what it makes to `folder`."""
    from compress.workspace import Source, from_reference

    source = Source(path=takes, name=takes.name, said=str(takes), is_reference=from_reference(takes))
    params = {k: v for k, v in step.params.items() if k not in ("out", "as_json")}
    return _CHECKS[step.step.stage](params, source, folder)


# ---- quantizing ----------------------------------------------------------------------------------------


def _awq(params: Params, source: Source, folder: Path) -> Foreseen:
    from compress.quantize.awq_stage import AwqRequest, awq_stage, check_codes
    from compress.quantize.group_size import asked_scheme

    symmetric = check_codes(params["bits"], params["sym"])
    scheme, _ = asked_scheme(
        source.path, params["bits"], params["group_size"], symmetric, params["skip"],
        trust_remote_code=params["trust_remote_code"],
    )  # fmt: skip
    request = AwqRequest(source=source, out=folder, scheme=scheme, **_fields(AwqRequest, params))
    return _quantized(awq_stage(request), request, folder)


def _int8(params: Params, source: Source, folder: Path) -> Foreseen:
    from compress.quantize.int8_stage import Int8Request, int8_stage

    request = Int8Request(source=source, out=folder, **_fields(Int8Request, params))
    return _quantized(int8_stage(request), request, folder)


def _auto(params: Params, source: Source, folder: Path) -> Foreseen:
    """What bits it will choose is measured; what stands in for it has two kinds of the menu, as what is made may."""
    from compress import foreseen
    from compress.cli.auto import asked_for, refused_here
    from compress.cli.judges import GATE, Judges, text_to_judge
    from compress.quantize.auto_stage import AutoRequest, Made, auto_stage
    from compress.quantize.choices import Choice
    from compress.quantize.menu import Menu
    from compress.search import Goal
    from compress.stage import estimated_bytes, shapes_of

    gate = GATE if params["gate"] is None and params["num_bytes"] is None else params["gate"]
    data = text_to_judge(source, params["data"], gate, params["calib"])
    asked = Menu(
        symmetric=params["symmetric"], int8=params["int8"], dense=params["float16"], lm_head=params["lm_head"]
    )  # fmt: skip
    model, menu, most, _ = asked_for(
        source, params["target"], params["format_"], params["context"], params["num_bytes"], asked,
        params["trust_remote_code"],
    )  # fmt: skip
    request = AutoRequest(source=source, out=folder, menu=menu, **_fields(AutoRequest, params))
    plan = refused_here(request, Goal(gate=gate, most=most, tries=params["tries"]), model)
    if data is not None:
        Judges(source.path, data, gate, params["max_tokens"], request.device, params["tries"])
    _check_calibration(request)
    shapes, first = shapes_of(model, plan), model.block_prefix(0)
    layers = dict(plan.layers)
    for name, (_, columns) in shapes.items():
        options = [option for option in menu.options(columns) if not option.is_dense]
        layers[name] = options[0] if name.startswith(first) else options[-1]
    chosen = LayerPlan(layers)
    stand_in = Choice(plan=chosen, labels=(), kl=0.0, num_bytes=0)
    made = Made(request=request, choice=stand_in, budget=0, found={"sets": []})
    foreseen.quantized(folder, source.path, auto_stage(made, shapes), model, chosen)
    dense = estimated_bytes(model, LayerPlan.dense(layers))
    return Foreseen(bytes=dense if most is None else min(most, dense), note="its size is measured: at most this")


def _fields(request: type[Any], params: Params) -> dict[str, Any]:
    """Those of a command's parameters that are fields of its request, the device and dtype as commands pick them."""
    from compress.devices import pick_device, pick_dtype

    device = pick_device(params["device"])
    picked = {**params, "device": device, "dtype": pick_dtype(params["dtype"], device)}
    return {f.name: picked[f.name] for f in fields(request) if f.name in picked}


def _quantized(stage: Stage, request: CalibratedRequest, folder: Path) -> Foreseen:
    from compress import foreseen
    from compress.model import StreamedModel
    from compress.stage import estimated_bytes, shapes_of

    model = StreamedModel.open(request.source.path, trust_remote_code=request.trust_remote_code)
    plan = stage.plan(model)
    assert stage.format is not None
    stage.format.check(plan, shapes_of(model, plan))
    _check_calibration(request)
    foreseen.quantized(folder, request.source.path, stage, model, plan)
    return Foreseen(bytes=estimated_bytes(model, plan))


def _check_calibration(request: CalibratedRequest) -> None:
    from compress.calibration import chosen_text

    spec = chosen_text(
        request.calib, seq_len=request.seq_len, model=request.source.path, is_reference=request.source.is_reference,
        device=request.device,
    )  # fmt: skip
    if spec == "self" and request.self_samples:
        raise ConfigError("self-samples adds to a text, but all rows are sampled from the model itself; raise samples")
    _check_text(spec)
    _check_text(request.watch)


def _check_text(spec: str | None) -> None:
    """ConfigError for a file that is not there or is no text. What the hub has is found when it is read."""
    from compress.texts import documents

    if spec is not None and spec != "self" and not spec.startswith("hf:"):
        next(iter(documents(spec)), None)


# ---- pruning and training ------------------------------------------------------------------------------


def _prune(params: Params, source: Source, folder: Path) -> Foreseen:
    from compress import foreseen
    from compress.cli.prune import AMOUNTS, asked_of
    from compress.model import StreamedModel
    from compress.prune.decide import bytes_per_number
    from compress.prune.prune_stage import PruneRequest, plan_of
    from compress.prune.shape import Counter, shape_of

    goal = {k: params[k] for k in ("params", "num_bytes", "target", "context", "max_kl", "candidates")}
    asked = asked_of({name: params[name] for name in AMOUNTS}, **goal)
    request = PruneRequest(source=source, out=folder, asked=asked, **_fields(PruneRequest, params))
    model = StreamedModel.open(source.path, trust_remote_code=request.trust_remote_code)
    plan_of(request, model)
    _check_calibration(request)
    counter = Counter(model)
    shape = shape_of(model) if asked.has_goal else asked.shape(model)
    foreseen.dense(folder, source.path, counter.config(shape), "prune")
    if asked.has_goal:
        return Foreseen(note="its shape is found by measuring, and what follows is checked again then")
    return Foreseen(bytes=round(counter.parameters(shape) * bytes_per_number(model)))


def _teach(params: Params, source: Source, folder: Path) -> Foreseen:
    from compress.distill.data import Mix, refuse_endless
    from compress.model import StreamedModel

    if not params["data"]:
        raise ConfigError('no text to teach; add data, such as data = ["self"]')
    refuse_endless(Mix.of(params["data"], params["mix"]), params["tokens"])
    StreamedModel.open(source.path)
    for spec in params["data"]:
        _check_text(spec)
    return Foreseen()


def _distill(params: Params, source: Source, folder: Path) -> Foreseen:
    from compress import foreseen
    from compress.cli.distill import request_of, teacher_of
    from compress.cli.start_codes import COMMANDS, is_quantized
    from compress.devices import available
    from compress.distill import memory, models, prepare
    from compress.distill.data import refuse_endless
    from compress.distill.request import DistillRequest

    if not params["data"] and params["cache"] is None:
        raise ConfigError('no text to learn on; add data, such as data = ["self"], or cache = "@teach"')
    if params["tensorboard"] and params["report"] is None:
        raise ConfigError("tensorboard writes into the report folder; add report as well")
    scheme = params["scheme"]
    if scheme is not None and not is_quantized(source.path):
        step = COMMANDS.get(scheme, "awq").partition(" ")[0]
        raise ConfigError(f'scheme = "{scheme}" trains the codes of a quantized student; put a step [{step}] before it')
    teacher = teacher_of(params["teacher"], source, scheme)
    asked = {"mix", *(f.name for f in fields(DistillRequest))} - {"teacher", "student", "out"}
    rest = {name: value for name, value in params.items() if name in asked}
    request = request_of(source, teacher, out=folder, **rest)
    prepare.refuse(request)
    micro, _ = prepare.sizes(request)
    rows = [prepare.output_rows(p) for p in (source.path, teacher.path)]
    models.common_vocabulary(source.path, teacher.path, *rows)
    if request.cache is None:
        refuse_endless(request.data, request.tokens)
    if request.tokens is not None:
        prepare.refuse_too_few(request.tokens, request.batch, request.seq_len)
    for spec in (*request.data.sources, request.watch):
        _check_text(spec)
    size, taught = prepare.parameters_of(source.path), prepare.parameters_of(teacher.path)
    needs = memory.Needs(
        trained=size,
        frozen=0,
        compute_bytes=4,
        teacher_parameters=taught if request.needs_teacher and request.cache is None else 0,
        teacher_bytes=1.01 if prepare.teacher_dtype(request, taught) == "w8a16" else 4,
        tokens=micro * request.seq_len,
        token_bytes=0,  # measured once the student is loaded: here is what it needs at least
        kept_bytes=0,
        checkpointing=request.checkpointing,
        shares=1,
        on_gpu=request.device.startswith("cuda"),
    )
    if request.lora is None:
        memory.require(needs, available(request.device), [("this", needs)])
    foreseen.same(folder, source.path, "distill")
    return Foreseen(bytes=_weights(source.path), memory=needs.total())


def _weights(folder: Path) -> int:
    from compress.checkpoint import Checkpoint

    return sum(info.num_bytes for info in Checkpoint.open(folder).tensors.values())


# ---- packaging and judging -----------------------------------------------------------------------------


def _export(params: Params, source: Source, folder: Path) -> Foreseen:
    from compress.artifact import read_manifest
    from compress.cli.export import options_of
    from exporters.export import ExportRequest, fitted, format_of, load_format, target_named
    from exporters.hf import vllm_rules
    from exporters.reader import Artifact

    machine = target_named(params["target"])
    chosen = format_of(params["format"], machine)
    common = ("artifact", "target", "format", "context", "batch", "force")
    options = options_of(chosen, **{name: value for name, value in params.items() if name not in common})
    request = ExportRequest(
        source=source, target=machine, format=chosen, context=params["context"], batch=params["batch"], out=folder,
        options=options,
    )  # fmt: skip
    artifact = Artifact(path=source.path)
    plan, sizing, wanted = fitted(request, chosen, load_format(chosen), artifact)
    if chosen == "hf":
        vllm_rules.check(artifact.folder, machine.sm)
    manifest = read_manifest(source.path)
    if wanted is not None and (manifest is None or manifest.record["stage"] != "awq"):
        made = "it has no manifest" if manifest is None else f"`{manifest.record['stage']}` made it"
        raise UnsupportedError(
            f"{chosen} takes {wanted.label()} codes, and only what `awq` made can be quantized again for it ({made}); "
            "let [awq] make such codes (sym, group-size)"
        )
    note = f"memory: {plan.batch} sequences of {plan.context} tokens"
    if wanted is not None:
        note += f"; quantized again with {wanted.label()} codes, which its reader takes"
    return Foreseen(bytes=sizing.weights, memory=sizing.run_peak, note=note)


def _evaluate(params: Params, source: Source, folder: Path) -> Foreseen:
    from compress.cli.evaluate import original_of, text_for
    from compress.devices import pick_device
    from compress.positions import refuse_longer
    from evaluators import tasks
    from evaluators.request import check_limit

    pick_device(params["device"])
    check_limit(params["limit"], [*params["tasks"], *params["lm_eval"]])
    original = original_of(source, params["reference"])
    _check_text(text_for(original, params["data"]))
    refuse_longer(source.path, params["context"], "--context")
    for spec in params["tasks"]:
        tasks.load_task(spec, params["limit"])
    if params["lm_eval"] and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError('lm-eval needs lm_eval, which is not installed; pip install "compress-toolkit[eval]"')
    return Foreseen()


_CHECKS: Mapping[str, Check] = {
    "awq": _awq, "int8": _int8, "auto": _auto, "prune": _prune, "teach": _teach, "distill": _distill, "export": _export,
    "evaluate": _evaluate,
}  # fmt: skip
