"""`compress export` from start to end: resolve, size, fit the layout, write, account, publish. One visible sequence.

A format is a module with `LAYOUT` and `write` (see `exporters.reader`). Everything that it writes lies in a scratch
folder until the manifest is there; then one rename makes OUT (`compress.output`), so a kill leaves no half of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import compress
from compress.artifact import links_elsewhere, manifest_of, parent_path, path_from, read_manifest, write_manifest
from compress.disk import check_free_space
from compress.errors import ArtifactError, ConfigError, UnsupportedError
from compress.files import write_bytes_atomically
from compress.formats import awq_gemm
from compress.model import StreamedModel
from compress.output import Place, reserved
from compress.scheme import Scheme
from compress.tell import SILENT, Tell
from compress.workspace import WORKSPACE, Source
from exporters import answer, readme
from exporters.reader import Artifact, Job, Layout, Written, is_int8
from exporters.requantize import requantize
from exporters.sizing.inventory import Model
from exporters.sizing.predict import (
    MOST_SEQUENCES,
    SERVED,
    Plan,
    Sizing,
    Takes,
    anything,
    check,
    most_sequences,
    native_kv_bits,
)
from exporters.sizing.targets import TARGETS, Target

FORMATS: dict[str, str] = {
    "hf": "exporters.hf.write",
    "onnx": "exporters.genai.write",
    "onnx-trt": "exporters.trt.write",
    "tensorrt": "exporters.engine.write",
    "edge": "exporters.edge.write",
}
# The pip extra that a format's own imports come from.
EXTRAS = {"onnx": "onnx", "onnx-trt": "onnx", "tensorrt": "onnx", "edge": "edge"}


class Format(Protocol):
    """The two names of a format's module."""

    __name__: str
    LAYOUT: Layout

    def write(self, job: Job) -> Written: ...


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What to export. context None: the target's default, at most what the model was made for. options: the format's.

    format None: the target's first. batch None: one sequence; where a server shares its memory among them, as many as
    fit, at most `MOST_SEQUENCES`. out None: artifacts/NAME-TARGET-FORMAT.
    """

    source: Source
    target: Target
    format: str | None = None
    context: int | None = None
    batch: int | None = None
    out: Path | None = None
    force: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ExportOutcome:
    """What was made. parts: bytes by name; fp16_bytes, fp32_bytes: the same model unquantized.

    requantized: the artifact made on the way because the reader needs other codes, or None. command: what runs it (or
    builds its engine), as `verb` says; typed where the export was asked for.
    """

    out: Path
    record: dict[str, Any]
    sizing: Sizing
    parts: dict[str, int]
    total_bytes: int
    fp16_bytes: int
    fp32_bytes: int
    requantized: Path | None
    notes: list[str]
    verb: str
    command: str


def export(request: ExportRequest, *, formats: Mapping[str, str] = FORMATS, tell: Tell = SILENT) -> ExportOutcome:
    """Write, verify and publish one export.

    Raises UnsupportedError for a format that the target or this installation cannot take, DoesNotFit when it is too
    big, and whatever the format raises; in every case nothing is left at the output folder.
    """
    name = format_of(request.format, request.target, formats)
    module = load_format(name, formats)
    artifact = request.source.path
    refuse_exports(artifact)
    out = request.out or WORKSPACE / f"{request.source.name}-{request.target.name}-{name}"
    with reserved(out, {"the artifact": artifact}, force=request.force) as place:
        return _export(request, name, module, place, tell)


def _export(request: ExportRequest, name: str, module: Format, place: Place, tell: Tell) -> ExportOutcome:
    """See `export`; the output is ours."""
    target, artifact = request.target, Artifact(path=request.source.path)
    artifact.look()
    plan, sizing, wanted = fitted(request, name, module, artifact)
    notes = [artifact.checked.note]
    requantized = None
    if wanted is not None:
        requantized = requantize(artifact.path, wanted, f"{target.name}'s {name} reader", place.out, tell)
        artifact = Artifact(path=requantized)
        plan = _plan(request, name, artifact)
        sizing, notes = check(artifact.model, plan, target), [*notes, artifact.checked.note]
    check_free_space(place.real.parent, 2 * sizing.weights + 64_000_000)
    tell.say(f"writing {name} for {target.name}: context {plan.context}, batch {plan.batch}")
    notes += [_cache_note(name, artifact), _sequences_note(request, plan)]
    run = place.start(_identity(request, name, plan), resume=False)
    job = Job(
        artifact=artifact.path,
        opened=artifact,
        target=target,
        context=plan.context,
        batch=plan.batch,
        staged=run.new_staged(),
        options=request.options,
        tell=tell,
    )
    try:
        written = module.write(job)
        usage = written.usage
        if not written.record.get("verified") or not sum(written.parts.values()) or usage is None:
            raise ArtifactError(
                f"format {name} does not say what it verified, what it wrote or how that is used; the export was not "
                "kept"
            )
        _write_readme(job, plan, artifact, written.parts, usage)
        record = _record(request, plan, sizing, artifact, requantized, place.out, written)
        manifest = manifest_of(record, artifact.path, place.out)
        record = write_manifest(job.staged, manifest, written.hashes).record
    except Exception:
        run.discard()  # what was not verified is not kept
        raise
    run.publish()
    return ExportOutcome(
        out=place.out,
        record=record,
        sizing=sizing,
        parts=dict(written.parts),
        total_bytes=sum(written.parts.values()),
        fp16_bytes=2 * artifact.model.num_parameters,
        fp32_bytes=4 * artifact.model.num_parameters,
        requantized=requantized,
        notes=[*written.notes, *filter(None, notes), *links_elsewhere(artifact.path), *place.notes],
        verb=usage.verb,
        command=usage.line(str(place.out)),
    )


def fitted(request: ExportRequest, name: str, module: Format, artifact: Artifact) -> tuple[Plan, Sizing, Scheme | None]:
    """What would run, how large it is, and the codes that the reader wants instead of the artifact's.

    Read from config.json and headers. Raises for what the format cannot hold and the target has no room for.
    """
    target = request.target
    context = context_for(artifact.model, target, request.context)
    answer.refuse_int8(artifact.path, artifact.folder.plan, module.LAYOUT, name, target, context)
    answer.refuse_mix(artifact.path, artifact.folder.plan, name, target)
    # transformers' folders may hold anything; a graph is of a decoder, and what is none is named for what it is
    with suppress(UnsupportedError) if name == "hf" or module.__name__ != FORMATS[name] else nullcontext():
        refuse_model(artifact.streamed, request, name, module, context)
    plan = _plan(request, name, artifact)
    takes: Takes = anything
    with suppress(UnsupportedError):
        takes = answer.taker(artifact.streamed)
    sizing = check(artifact.model, plan, target, takes)
    wanted = wanted_codes(module.LAYOUT, artifact)
    return plan, sizing, wanted


def _plan(request: ExportRequest, name: str, artifact: Artifact) -> Plan:
    """What is to run: the context and the sequences asked for, or what the target has room for."""
    context = context_for(artifact.model, request.target, request.context)
    plan = Plan(format=name, context=context, batch=request.batch or 1, kv_bits=_kv_bits(name, artifact))
    if request.batch is None and name in SERVED:
        plan = replace(plan, batch=max(1, most_sequences(artifact.model, plan, request.target)))
    return plan


def _sequences_note(request: ExportRequest, plan: Plan) -> str | None:
    """Where the number of sequences in files that start a server comes from, and what changes it."""
    if plan.format not in SERVED:
        return None
    if request.batch is not None:
        return f"the files in serve/ ask for max-num-seqs={plan.batch}, as --batch says"
    name = request.target.name
    if plan.batch == MOST_SEQUENCES:
        why = f"the most that is asked for unasked, {name} has room for it; --batch N asks for another number"
    else:
        why = (
            f"as many as fit {name} with {plan.context} tokens each; --batch N asks for another number, and a smaller "
            "--context leaves room for more"
        )
    return f"the files in serve/ ask for max-num-seqs={plan.batch}: {why}"


def _write_readme(job: Job, plan: Plan, artifact: Artifact, parts: Mapping[str, int], usage: readme.Usage) -> None:
    text = readme.text(
        usage,
        name=artifact.path.resolve().name,
        format=plan.format,
        target=job.target.name,
        context=plan.context,
        batch=plan.batch,
        parts=parts,
        fp16=2 * artifact.model.num_parameters,
    )
    write_bytes_atomically(job.staged / "README.md", text.encode())


def _kv_bits(name: str, artifact: Artifact) -> int:
    """Of a number in the KV cache: the artifact's own wish where the format's reader takes it."""
    kv = artifact.folder.plan.kv
    return kv.num_bits if name == "hf" and kv is not None else native_kv_bits(name)


def _cache_note(name: str, artifact: Artifact) -> str | None:
    """Says that the artifact's INT8 cache stays behind, where it does."""
    if name == "hf" or artifact.folder.plan.kv is None:
        return None
    return (
        f"the KV cache of {name} holds floats: the artifact's INT8 cache is vLLM's, and what it costs is not paid here"
    )


def _identity(request: ExportRequest, name: str, plan: Plan) -> dict[str, Any]:
    """What tells one export's scratch folder from another's."""
    return {
        "stage": "export",
        "format": name,
        "target": request.target.name,
        "artifact": str(request.source.path.resolve()),
        "options": {"context": plan.context, "batch": plan.batch, **request.options},
    }


# ---- what can be asked for -----------------------------------------------------------------------------


def target_named(name: str) -> Target:
    """The target called `name`. Raises ConfigError that lists them."""
    if name not in TARGETS:
        raise ConfigError(f"--target {name}: there is no such target; known are {', '.join(TARGETS)}")
    return TARGETS[name]


def format_of(name: str | None, target: Target, formats: Mapping[str, str] = FORMATS) -> str:
    """The format asked for, or the target's first. Raises when there is no such format or no reader of it."""
    if name is None:
        return target.formats[0]
    if name not in formats:
        raise ConfigError(f"--format {name}: there is no such format; known are {', '.join(formats)}")
    if name not in target.formats:
        raise UnsupportedError(
            f"--format {name}: the readers of {target.name} take {', '.join(target.formats)}; choose one of them, or "
            "another --target (compress targets)"
        )
    return name


def load_format(name: str, formats: Mapping[str, str] = FORMATS) -> Format:
    """The format's module, or one sentence that says what to install."""
    try:
        module: Any = importlib.import_module(formats[name])
    except ModuleNotFoundError as e:
        if e.name and formats[name].startswith(e.name):
            raise UnsupportedError(f"--format {name}: this installation does not include it") from None
        extra = EXTRAS.get(name)
        way_out = f'pip install "compress-toolkit[{extra}]"' if extra else f"pip install {e.name}"
        raise ConfigError(f"--format {name} needs {e.name}, which is not installed; {way_out}") from None
    format: Format = module
    return format


def context_for(model: Model, target: Target, asked: int | None) -> int:
    """The context to size for. ConfigError when the model was not made for so many tokens."""
    limit = model.max_positions
    if asked is None:
        return min(target.context, limit or target.context)
    if limit is not None and asked > limit:
        raise ConfigError(f"--context {asked}: {model.name} was made for at most {limit} tokens; ask for no more")
    return asked


def wanted_codes(layout: Layout, artifact: Artifact) -> Scheme | None:
    """The scheme to quantize the artifact again with for this reader, None when its codes will do."""
    if not artifact.model.packed:
        return None
    schemes = artifact.plan.groups()
    wanted = [layout.wants(scheme.weight) for scheme in schemes if scheme.weight is not None and not is_int8(scheme)]
    return next((scheme for scheme in wanted if scheme is not None), None)


def refuse_model(model: StreamedModel, request: ExportRequest, name: str, module: Format, context: int) -> None:
    """Raise ConfigError, with the nearest thing that works, for a model that the format cannot hold."""
    path = request.source.path
    if module.__name__ != FORMATS.get(name):
        return
    scheme = answer.held(model, name)
    if scheme is not None and model.stored.format is not awq_gemm:
        return
    reason = answer.refusal(model, name, context, scheme)
    if reason is not None:
        raise ConfigError(f"{reason}; {answer.nearest(model, path, request.target, context)}")


def refuse_exports(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    if manifest is not None and manifest.record["stage"] == "export":
        origin = manifest.record.get("requantized_from") or manifest.record["parent"]["path"]
        with suppress(ArtifactError):  # gone: as it was called
            origin = parent_path({"path": origin}, artifact)
        raise ConfigError(f"{artifact} is an export already; pass the artifact that it was made from, {origin}")


# ---- the manifest --------------------------------------------------------------------------------------


def _record(
    request: ExportRequest,
    plan: Plan,
    sizing: Sizing,
    artifact: Artifact,
    requantized: Path | None,
    out: Path,
    written: Written,
) -> dict[str, Any]:
    """The export's record: what was asked, what was made of it, how large, how verified."""
    total = sum(written.parts.values())
    content = artifact.checked.content_sha256(artifact.folder.checkpoint)
    return {
        "stage": "export",
        "format": plan.format,
        "target": request.target.name,
        "options": {"context": plan.context, "batch": plan.batch, **request.options},
        "parent": {"path": path_from(out, artifact.path), "sha256": content},
        "requantized_from": path_from(out, request.source.path) if requantized else None,
        "machine": {k: getattr(request.target, k) for k in ("sm", "jetpack", "tensorrt", "memory_bytes", "usable")},
        "sizing": sizing.to_json(),
        "parts": dict(written.parts),
        "bytes": total,
        "ratio_to_fp16": round(2 * artifact.model.num_parameters / total, 4),
        "ratio_to_fp32": round(4 * artifact.model.num_parameters / total, 4),
        "written": written.record,
        "notes": list(written.notes),
        "versions": {"compress": compress.__version__},
    }
