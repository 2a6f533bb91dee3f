"""`compress distill` from start to end: prepare, train, write, verify, publish. One visible sequence."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compress import distributed, output
from compress.artifact import manifest_of, path_from, read_manifest
from compress.distill import flops, lora, models, prepare, qad, teacher
from compress.distill.cache import CachedTeacher
from compress.distill.checkpoint import Checkpoints
from compress.distill.engine import SHARING, Engine, EngineOptions
from compress.distill.gradients import compression_of
from compress.distill.manifest import content, versions
from compress.distill.meter import Meter
from compress.distill.models import LoadedModel
from compress.distill.optim import Rate, adamw
from compress.distill.request import DTYPES, DistillOutcome, DistillRequest
from compress.distill.rows import Rows
from compress.distill.signals import Stop, stoppable
from compress.distill.student import Student
from compress.distill.teacher import Lessons
from compress.distill.train import Plan, State, Training
from compress.distill.watch import Watch
from compress.distill.write import curve_csv, write_model
from compress.errors import ConfigError
from compress.output import Place, Run
from compress.tell import SILENT, Tell

# Looks at the watched text in a run, unless told how often.
LOOKS = 10
CURVE_POINTS = 60


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """What training starts from. flops: operations a token, as `flops.per_token` counts them. room: see `memory`."""

    student: LoadedModel
    taught: LoadedModel | None
    lessons: Lessons
    rows: Rows
    watch: Watch | None
    plan: Plan
    states: tuple[int, ...]
    teacher_held_as: str | None
    flops: float
    room: bool

    def meter(self) -> Meter:
        """Of this run's speed. The peak is that of all processes' GPUs."""
        device = next(self.student.model.parameters()).device
        peak = flops.peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        tokens = self.plan.batch * self.rows.seq_len
        return Meter(tokens, self.flops, None if peak is None else peak * distributed.num_processes())


Heard = Callable[[dict[str, float], Prepared], None]
Describe = Callable[[dict[str, float]], str]


def distill(
    request: DistillRequest,
    *,
    tell: Tell = SILENT,
    heard: Heard = lambda record, prepared: None,
    describe: Describe = lambda record: f"loss {record['loss']:.4f}",
) -> DistillOutcome:
    """Train `request.student` to do what `request.teacher` does; an artifact at `request.out`.

    Under `torchrun` the processes share each update; the first writes, and all return the outcome. `heard` gets each
    record of the curve as it is computed, and `describe` says what is shown of it. Raises CompressError subclasses;
    nothing is then at `request.out`, and what was trained stays in the run's scratch folder for the same command.
    """
    prepare.refuse(request)
    with distributed.joined(request.device) as device, stoppable() as stop, ExitStack() as held:
        request = replace(request, device=device)
        place = distributed.first_does(lambda: held.enter_context(_reserve(request)))
        outcome = _distill(request, place, stop, tell, heard, describe)
        distributed.wait_for_all()
        return outcome


def _reserve(request: DistillRequest) -> Any:
    reads = {"the student": request.student.path, "the teacher": request.teacher.path}
    for source in (*request.data.sources, *([request.watch] if request.watch else [])):
        reads.update(output.file_read(source))
    if request.cache is not None:
        reads["the cache"] = request.cache
    return output.reserved(request.out, reads, force=request.force)


def _distill(
    request: DistillRequest, place: Place | None, stop: Stop, tell: Tell, heard: Heard, describe: Describe
) -> DistillOutcome:
    _engine_options(request).resolved(distributed.num_processes())
    vocabulary = models.common_vocabulary(
        request.student.path,
        request.teacher.path,
        prepare.output_rows(request.student.path),
        prepare.output_rows(request.teacher.path),
    )
    hashes = {"student": content(request.student), "teacher": content(request.teacher)}
    run = distributed.first_does(lambda: _start(request, place, hashes))
    if distributed.told_by_first(lambda: run is not None and run.is_published()):
        if run is not None:
            run.close()
        return _outcome_of(request.out, ["an earlier run had finished this artifact; nothing was left to do"])
    scratch = Path(distributed.told_by_first(lambda: str(run.folder if run else "")))
    ready = _prepare(request, scratch, vocabulary, hashes["teacher"], tell)
    engine, training = _training(request, scratch, ready, stop, tell, heard, describe)
    state = training.run(resume=request.resume)
    whole = lora.merged(engine.whole_state())
    facts = _facts(request, ready, training, state, engine.kind)

    def finish() -> tuple[dict[str, Any], int]:
        assert run is not None
        record = {**_record(request, hashes, facts), **_stored_as(ready.student)}
        staged = run.new_staged()
        verified = write_model(
            run.folder,
            staged,
            ready.student,
            {name.removeprefix("model."): value for name, value in whole.items()},
            curve=curve_csv(state.curve, request.batch * request.seq_len),
            manifest=manifest_of(record, request.student.path, request.out),
        )
        run.publish()
        return record, verified

    record, verified = distributed.told_by_first(finish)
    notes = place.notes if place is not None else []
    return DistillOutcome(out=request.out, record=record, verified=verified, notes=notes)


def _start(request: DistillRequest, place: Place | None, hashes: dict[str, str]) -> Run:
    assert place is not None
    identity = {"stage": "distill", **hashes, **request.options(), "versions": versions()}
    return place.start(identity, resume=request.resume)


def _prepare(request: DistillRequest, scratch: Path, vocabulary: int, teacher_sha256: str, tell: Tell) -> Prepared:
    cached = None
    if request.cache is not None:
        cached = CachedTeacher.open(request.cache)
        cached.refuse_other(
            request.cache,
            teacher=request.teacher.path,
            sha256=teacher_sha256,
            temperature=request.temperature,
            isolate=request.isolate,
        )
        request = replace(request, seq_len=cached.rows.seq_len)
    micro, _ = prepare.sizes(request)
    kind = _engine_options(request).resolved(distributed.num_processes())
    loaded: list[LoadedModel] = []
    size = prepare.parameters_of(request.teacher.path)
    held_as = prepare.teacher_dtype(request, size)

    def taught() -> LoadedModel:
        if not loaded:
            loaded.append(prepare.load_teacher(request, held_as))
        return loaded[0]

    if cached is not None:
        rows = prepare.cached_rows(request, cached, scratch / "rows", vocabulary)
    else:
        rows = prepare.training_rows(request, scratch / "rows", vocabulary, taught, tell)
    steps = prepare.num_steps(request, rows)
    student = prepare.load_student(request)
    live = taught() if request.needs_teacher and cached is None else None
    shares = distributed.num_processes() if kind in SHARING else 1
    room = prepare.check_memory(request, student, live, held_as, micro, shares, kind)
    mine, theirs = prepare.states(request, student, live)
    if live is not None and kind in SHARING and held_as != "w8a16" and not room:
        teacher.shard(live)
    lessons = prepare.lessons_of(request, live, cached, theirs)
    watch = _watch(request, scratch, vocabulary, live, theirs, steps, micro)
    if request.lora is not None:
        lora.add(student, request.lora, request.seed)
    return Prepared(
        student=student,
        taught=live,
        lessons=lessons,
        rows=rows,
        watch=watch,
        plan=_plan(request, steps, micro, vocabulary),
        states=tuple(mine),
        teacher_held_as=held_as if live is not None else None,
        flops=flops.per_token(student.model, None if live is None else live.model, frozen=request.lora is not None),
        room=room,
    )


def _watch(
    request: DistillRequest,
    scratch: Path,
    vocabulary: int,
    live: LoadedModel | None,
    theirs: list[int],
    steps: int,
    micro: int,
) -> Watch | None:
    """The second text that is looked at now and then, if there is one."""
    watched = prepare.watch_rows(request, scratch / "watch", vocabulary)
    if watched is None:
        return None
    return Watch(
        rows=watched,
        lessons=prepare.lessons_of(request, live, None, theirs),
        by="cross_entropy" if live is None else "divergence",
        every=request.watch_every or max(1, -(-steps // LOOKS)),
        patience=request.patience,
        micro=micro,
        isolate=request.isolate,
    )


def _plan(request: DistillRequest, steps: int, micro: int, vocabulary: int) -> Plan:
    """How many updates, of what, at which rate."""
    return Plan(
        steps=steps,
        batch=request.batch,
        micro=micro,
        # codes settle on one side of a rounding threshold only as the rate goes to nothing
        rate=Rate(peak=request.rate, warmup=request.warmup, floor=0.1 if request.scheme is None else 0.0),
        clip=request.clip,
        seed=request.seed,
        isolate=request.isolate,
        on_policy=request.on_policy,
        num_ids=prepare.num_ids(request.teacher.path, vocabulary),
        checkpoint_steps=request.checkpoint_steps,
        checkpoint_seconds=60 * request.checkpoint_minutes,
    )


def _engine_options(request: DistillRequest) -> EngineOptions:
    return EngineOptions(
        engine=request.engine,
        compute=DTYPES[request.dtype],
        device=request.device,
        compress_gradients=request.compress_gradients,
        exact_parameters=request.scheme is not None,
        clip=request.clip,
    )


def _training(
    request: DistillRequest, scratch: Path, ready: Prepared, stop: Stop, tell: Tell, heard: Heard, describe: Describe
) -> tuple[Engine, Training]:
    options = replace(_engine_options(request), keep_gathered=ready.room)
    kind = options.resolved(distributed.num_processes())
    if request.compile:
        if kind != "deepspeed":  # whose hooks inside a block, one a layer, part what is compiled
            ready.student.compile_blocks()
        if ready.taught is not None and ready.teacher_held_as != "w8a16":
            ready.taught.compile_blocks()
    student = Student(ready.student, request.goal, states=ready.states, fuse=request.compile)
    if kind != "fsdp" or options.exact_parameters:  # FSDP2 has its own policy
        narrow = request.device.startswith("cuda") and request.scheme is None
        student.compute_in(None if options.compute == torch.float32 else options.compute, narrow=narrow)
    engine = Engine.start(
        student,
        adamw(
            student.named_parameters(),
            0.0 if request.scheme else request.weight_decay,
            qad.rate_of if request.scheme else lambda name: 1.0,
            eps=qad.EPS if request.scheme else 1e-8,
        ),
        options,
        block_class=type(ready.student.blocks[0]).__name__,
        micro_batch=ready.plan.micro,
        accumulation=ready.plan.passes,
    )
    compression = None
    if request.compress_gradients is not None:
        begins = round(0.1 * ready.plan.steps)
        compression = compression_of(engine.module, request.compress_gradients, begins, request.seed)
    what = {"processes": distributed.num_processes(), "engine": engine.kind, "data": ready.rows.sha256}
    training = Training(
        engine,
        ready.lessons,
        ready.rows,
        ready.plan,
        Checkpoints(scratch / "checkpoints", what),
        watch=ready.watch,
        compression=compression,
        stop=stop,
        tell=tell,
        heard=lambda record: heard(record, ready),
        describe=describe,
    )
    return engine, training


# ---- the manifest ------------------------------------------------------------------------------------


def _facts(request: DistillRequest, ready: Prepared, training: Training, state: State, kind: str) -> dict[str, Any]:
    """What a run found out: data, tokens, curves."""
    every = max(1, len(state.curve) // CURVE_POINTS)
    tokens = request.batch * ready.rows.seq_len
    saved = None if training.compression is None else training.compression.saved()
    return {
        "engine": {"kind": kind, "processes": distributed.num_processes()},
        "data": {"sha256": ready.rows.sha256, "num_rows": len(ready.rows), "sources": ready.rows.sources},
        "teacher_held_as": ready.teacher_held_as,
        "steps": state.step,
        "kept_step": state.step if state.best_step is None else state.best_step,
        "tokens": state.step * tokens,
        "micro_batch": ready.plan.micro,
        "curve": [{**r, "tokens": r["step"] * tokens} for r in state.curve[every - 1 :: every]],
        "watch": None if ready.watch is None else _watched(ready.watch, state),
        "gradient_bytes": saved,
        "flops_per_token": ready.flops,
    }


def _stored_as(student: LoadedModel) -> dict[str, Any]:
    stored = student.stored
    if stored.format is None:
        return {"format": "dense"}
    return {"format": stored.format.NAME, "plan": stored.plan.to_json()}


def _watched(watch: Watch, state: State) -> dict[str, Any]:
    return {"sha256": watch.rows.sha256, "by": watch.by, "looks": state.watched, "sources": watch.rows.sources}


def _record(request: DistillRequest, hashes: dict[str, str], facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "stage": "distill",
        "options": request.options(),
        "parent": {"path": path_from(request.out, request.student.path), "sha256": hashes["student"]},
        "teacher": {"path": path_from(request.out, request.teacher.path), "sha256": hashes["teacher"]},
        "versions": versions(),
        **facts,
    }


def _outcome_of(out: Path, notes: list[str]) -> DistillOutcome:
    manifest = read_manifest(out)
    if manifest is None:
        raise ConfigError(f"{out} has no manifest; pass --force to make it again")
    return DistillOutcome(out=out, record=manifest.record, verified=0, notes=notes)
