"""What a stage is, and the one driver that runs it: identity, journal, stream, assemble, verify, publish.

A stage that goes through a model block by block (quantization, pruning) says what makes it that stage: its options, the
plan of layers, what a block becomes, how what lies outside the blocks is stored, the new config. Everything else is the
same for all of them: where the run may write, calibration rows, several processes, resuming, verifying, the manifest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import compress
from compress import distributed, output
from compress.artifact import (
    MANIFEST,
    carried_files,
    links_elsewhere,
    manifest_of,
    parent_path,
    path_from,
    read_manifest,
)
from compress.assemble import Cut, assemble, is_linked, nothing_cut, write_rest
from compress.background import meanwhile
from compress.block import BlockDone, BlockResult, LoadedBlock
from compress.blocks import Reshaping, stream
from compress.calibration_rows import Rows, Text, read_rows, weight_bytes
from compress.checkpoint import Checkpoint
from compress.contents import SMALL_BYTES, Checked, check_files
from compress.disk import check_free_space
from compress.errors import ArtifactError, UnsupportedError
from compress.formats import Format
from compress.journal import Facts, Journal, SharedStore
from compress.linear import is_linear, linears, weight_OI
from compress.model import StreamedModel
from compress.output import Place, Run
from compress.plan import DENSE, LayerPlan
from compress.statistics import Wanted
from compress.tell import Tell
from compress.verify import ReadingBack
from compress.workspace import Source

T = TypeVar("T")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Bytes of the small files, and what a file system needs to breathe.
_SLACK = 64_000_000


def as_it_is(value: Tensor, name: str) -> Tensor:
    """The rule for tensors outside the blocks that changes nothing."""
    return value


def every_block(model: StreamedModel) -> Sequence[int]:
    """All blocks, in the model's order."""
    return range(model.num_blocks)


def nothing_to_warm(device: torch.device) -> None:
    """Of a stage that compiles nothing."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage, ready to run; made by its own module from what the user asked for.

    name: as the command line and manifests call it. options: JSON of everything that decides the bytes and is not the
    model, the calibration rows or the versions; it goes into the identity and the manifest. format: how quantized
    layers are written, None for a stage whose layers stay dense. paths, wants: what `block` needs of the calibration
    rows; see `blocks.stream`.

    plan(model): what every linear becomes, those outside the blocks included, by the checkpoint's names. Refuses what
    the method cannot do, before any work; the format's own refusals follow.
    block(loaded, plan): the block after the stage. Its tensors may have other shapes than the model's.
    config(model, plan): the new config.json; the driver adds the `quantization_config` of the format.
    record(done, plan): the stage's own part of the manifest, from the blocks' reports.
    stored(value, name): a tensor outside the blocks, or a run of its rows, as it is stored; see `assemble.write_rest`.
    cut(name, shape): for each axis of a tensor outside the blocks the indices to keep (int64, sorted), None for all.
    blocks(model): the blocks that go on, ascending. The others are left out, and those that follow are renumbered.
    reshaping: with two paths, see `blocks.stream`.
    measure(model, rows, facts, tell): what must be measured before it is known what is made, JSON; kept with the run.
    decided(model, measured): the stage as it then is. Its plan is asked for again.
    refine(job, made, tell): what is left to do once all blocks are made, on all of them together.
    proof(model, staged, record): raises ArtifactError unless what was written is what was meant, before it has a name.
    warm(device): what the first block needs and no weight does, such as compiling; done while the rows are read.
    behind(model, hidden, plan=plan): the linears behind the blocks that the plan quantizes, by their full names, given
    the original model's final hidden states batch by batch. None where the plan quantizes none.
    """

    name: str
    options: Mapping[str, Any]
    plan: Callable[[StreamedModel], LayerPlan]
    block: Callable[[LoadedBlock, LayerPlan], BlockResult]
    config: Callable[[StreamedModel, LayerPlan], dict[str, Any]]
    record: Callable[[Sequence[BlockDone], LayerPlan], dict[str, Any]]
    format: Format | None = None
    paths: int = 1
    wants: Wanted = field(default_factory=Wanted)
    stored: Callable[[Tensor, str], Tensor] = as_it_is
    cut: Callable[[str, tuple[int, ...]], Cut] = nothing_cut
    blocks: Callable[[StreamedModel], Sequence[int]] = every_block
    reshaping: Reshaping = field(default_factory=Reshaping)
    measure: Callable[[StreamedModel, Rows, Facts, Tell], Mapping[str, Any]] | None = None
    decided: Callable[[StreamedModel, Mapping[str, Any]], Stage] | None = None
    refine: Callable[[Job, Made, Tell], Refined] | None = None
    proof: Callable[[StreamedModel, Path, Mapping[str, Any]], None] | None = None
    warm: Callable[[torch.device], None] = nothing_to_warm
    behind: Callable[..., BlockResult] | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every stage is told, whatever it does: which model, where to, on what text, how to compute.

    dtype: of the passes over the calibration rows (`DTYPES`). force: replace `out`. resume: take up a killed run.
    rows: those of `text`, where they were read already. home: where the folder will lie in the end, if not at `out`;
    the manifest's paths lead from there.
    """

    source: Source
    out: Path
    text: Text = field(default_factory=Text)
    dtype: str = "float32"
    device: str = "cpu"
    force: bool = False
    resume: bool = True
    trust_remote_code: bool = False
    rows: Rows | None = None
    home: Path | None = None

    @property
    def lies_at(self) -> Path:
        """The place that the manifest's paths lead from."""
        return self.home or self.out


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a run has on disk before it is assembled: files of what lies outside the blocks, and the blocks' journal.

    model: the one that is read, nothing of it loaded. ids_NT: all calibration rows, int64. behind: the file of linears
    behind the blocks that are quantized, if any.
    """

    model: StreamedModel
    ids_NT: Tensor
    journal: Journal
    num_blocks: int
    rest: list[Path]
    behind: list[Path] = field(default_factory=list)

    @property
    def parts(self) -> list[Path]:
        """All files, each with its record beside it."""
        return self.rest + [self.journal.tensors_path(i) for i in range(self.num_blocks)] + self.behind


@dataclass(frozen=True, kw_only=True)
class Refined:
    """The files to assemble instead of `Made.parts`, what the manifest says of it, and notes for the user."""

    parts: list[Path]
    record: dict[str, Any]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was made: the folder, its record in the manifest, bytes of weights, tensors verified, blocks resumed."""

    out: Path
    record: dict[str, Any]
    source_bytes: int
    out_bytes: int
    verified: int
    resumed: int = 0
    notes: list[str] = field(default_factory=list)


def run(stage: Stage, job: Job, tell: Tell) -> Outcome:
    """Run a stage from the model at `job.source` to the artifact at `job.out`.

    Under `torchrun`, the processes share the calibration rows and the first one writes; all return the outcome. Raises
    CompressError subclasses, each before anything is at `job.out`.
    """
    with distributed.joined(job.device) as device, ExitStack() as held:
        job = replace(job, device=device)
        reads = {"the model": job.source.path, **output.file_read(job.text.calib, job.text.watch)}

        def reserve() -> Place:
            return held.enter_context(output.reserved(job.out, reads, force=job.force))

        place = distributed.first_does(reserve)
        outcome = _run(stage, job, place, held, tell)
        distributed.wait_for_all()
        return outcome or _found(job, [])


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """What a run knows before it writes: the opened model, the plan, the rows, and the blocks that go on.

    written_plan: the plan by the names that layers are written under. stamp: of the model's files, to see a change.
    warmed: what the first block waits for.
    """

    stage: Stage
    job: Job
    model: StreamedModel
    plan: LayerPlan
    written_plan: LayerPlan
    chosen: list[int]
    rows: Rows
    stamp: list[tuple[str, int, int, int]]
    warmed: Future[None]


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """The scratch folder of a run that may go on, the model's small files, which were compared, and notes."""

    place: Place
    run: Run
    small: Checked
    notes: list[str]


def _run(stage: Stage, job: Job, place: Place | None, held: ExitStack, tell: Tell) -> Outcome | None:
    """See `run`. None, as `place` is, in a process that does not write."""
    ready = _prepare(stage, job, held, tell)
    begun = distributed.first_does(lambda: _begin(ready, place, tell))
    if distributed.told_by_first(lambda: begun is not None and begun.run.is_published()):
        if begun:
            begun.run.close()
        return _found(job, ["an earlier run had finished this artifact; nothing was left to do"])
    rows = ready.rows
    tell.say(f"calibration: {rows.text.source}, {len(rows.ids_NT)} x {rows.ids_NT.shape[1]} tokens")
    ready = _decide(ready, begun, tell)
    stage = ready.stage
    tell.start("block", len(ready.chosen) + (stage.behind is not None))
    if begun is None:
        _blocks(ready, SharedStore(None), tell)
        return None
    reading = ReadingBack(_config(ready))
    kept = {"kept": reading.take} if _enters_as_it_is(ready) else {}
    journal = Journal(begun.run.folder, begun.run.id, stage.format, ready.written_plan, **kept)
    made = {f"{name}.weight" for name in outside_of(ready.model, ready.plan)}
    write = partial(write_rest, journal, ready.model, stage.stored, stage.cut, made)
    # Neither needs the blocks, so both are done beside them; no sooner, as the first block waits for the disk.
    under_way = Event()
    settle = partial(_once, under_way, partial(_settle, ready, begun))
    try:
        with reading, meanwhile(settle) as content, meanwhile(partial(_once, under_way, write)) as rest:
            try:
                done = _blocks(ready, SharedStore(journal, partial(_check_unchanged, ready, content, under_way)), tell)
            finally:
                under_way.set()
            return _finish(ready, begun, journal, rest.result(), content.result(), done, reading, tell)
    except BaseException:
        if begun.run.content is None:  # the model was refused: nothing here will ever be of use
            begun.run.discard()
        raise


def _prepare(stage: Stage, job: Job, held: ExitStack, tell: Tell) -> _Prepared:
    """Open, plan, refuse, read the calibration rows. Nothing is written. held: what is under way until it is left."""
    model = StreamedModel.open(
        job.source.path, dtype=DTYPES[job.dtype], device=job.device, trust_remote_code=job.trust_remote_code
    )
    plan = stage.plan(model)
    if stage.format is not None:
        stage.format.check(plan, shapes_of(model, plan))
    stamp = model.checkpoint.stamp()
    chosen = list(stage.blocks(model))
    # Nothing is refused any more but the text, so what the first block needs is made ready meanwhile.
    warmed = held.enter_context(meanwhile(partial(stage.warm, model.device)))
    if model.device.type == "cuda":
        model.prefetch_block(chosen[0])
    # One process reads: several that read might find different rows.
    rows = distributed.told_by_first(lambda: job.rows or rows_of(job, model, tell))
    return _Prepared(
        stage=stage,
        job=job,
        model=model,
        plan=plan,
        written_plan=renumbered(plan, model, chosen),
        chosen=chosen,
        rows=rows,
        stamp=stamp,
        warmed=warmed,
    )


def rows_of(job: Job, model: StreamedModel, tell: Tell) -> Rows:
    """The job's calibration rows, read anew; see `calibration_rows.read_rows`."""
    return read_rows(
        job.text,
        model,
        is_reference=job.source.is_reference,
        trust_remote_code=job.trust_remote_code,
        tell=tell,
    )


def _decide(ready: _Prepared, begun: _Begun | None, tell: Tell) -> _Prepared:
    """What the stage becomes by what it measures; measured once a run."""
    stage, model = ready.stage, ready.model
    if stage.measure is None or stage.decided is None:
        return ready

    def measured() -> Mapping[str, Any]:
        assert begun is not None and stage.measure is not None
        return stage.measure(model, ready.rows, Facts(begun.run.folder, begun.run.id), tell)

    decided = stage.decided(model, distributed.told_by_first(measured))
    plan, chosen = decided.plan(model), list(decided.blocks(model))
    if decided.format is not None:
        decided.format.check(plan, shapes_of(model, plan))
    return replace(ready, stage=decided, chosen=chosen, plan=plan, written_plan=renumbered(plan, model, chosen))


def _begin(ready: _Prepared, place: Place | None, tell: Tell) -> _Begun:
    """Take up, or make, the scratch folder of this run.

    Large files are hashed here only if there is something to take up. That takes as long as the disk does, so a run
    with nothing to take up computes blocks meanwhile (`_settle`).
    """
    assert place is not None
    stage, job, model = ready.stage, ready.job, ready.model
    # Finished blocks, their merged copy and the tensors around them exist side by side at the end.
    copies = 2 if stage.refine is None else 3
    check_free_space(place.real.parent, copies * estimated_bytes(model, ready.plan) + _SLACK)
    small = check_files(model.checkpoint.path, below=SMALL_BYTES)
    identity = {
        "stage": stage.name,
        **stage.options,
        "calibration": ready.rows.sha256(),
        "versions": versions(),
    }
    started = place.start(identity, resume=job.resume, content=partial(_content, model, small))
    if started.anew:
        tell.say(
            "an earlier run was killed before the model's hash was known, so nothing shows that its blocks are of "
            "these weights: they are computed again"
        )
    notes = [*filter(None, [small.note]), *links_elsewhere(model.checkpoint.path)]
    return _Begun(place=place, run=started, small=small, notes=notes)


def _content(model: StreamedModel, small: Checked) -> str:
    """The model's content hash; its large files are read and compared with its manifest, if it has one."""
    return check_files(model.checkpoint.path, known=small.hashes).content_sha256(model.checkpoint)


def _settle(ready: _Prepared, begun: _Begun) -> str:
    """The content hash of what this run reads; from then on the run can be taken up again."""
    if begun.run.content is None:
        content = _content(ready.model, begun.small)
        _refuse_change(ready)  # before it is said: blocks were read before these bytes were hashed
        begun.run.settle(content)
    assert begun.run.content is not None
    return begun.run.content


def _once(happened: Event, work: Callable[[], T]) -> T:
    """Do the work once something has happened."""
    happened.wait()
    return work()


def _check_unchanged(ready: _Prepared, content: Future[str], under_way: Event) -> None:
    """Raise as soon as it is known that the model is not, or is no longer, what it must be; at every block.

    Called when a block's weights have been read, which `under_way` is told.
    """
    under_way.set()
    if content.done():
        content.result()
    _refuse_change(ready)


def _refuse_change(ready: _Prepared) -> None:
    """ArtifactError if a file of the model is not the one it was when the run began, or was written to."""
    try:
        same = ready.model.checkpoint.stamp() == ready.stamp
    except OSError:  # gone, or not to be reached any more
        same = False
    if not same:
        raise ArtifactError(f"{ready.job.source.path} was changed while it was read; run the same command again")


def _blocks(ready: _Prepared, store: SharedStore, tell: Tell) -> list[BlockDone]:
    """Stream the model through the stage."""
    stage, done = ready.stage, []
    behind = None if stage.behind is None else partial(stage.behind, ready.model, plan=ready.plan)

    def block(loaded: LoadedBlock) -> BlockResult:
        ready.warmed.result()
        return stage.block(loaded, ready.plan)

    for step in stream(
        ready.model,
        ready.rows.ids_NT,
        block,
        store,
        plan=ready.plan,
        paths=stage.paths,
        wanted=stage.wants,
        blocks=ready.chosen,
        reshaping=stage.reshaping,
        behind=behind,
        tell=tell,
    ):
        done.append(step)
        tell.step(step.index + 1, found=step.report, resumed=step.resumed)
    return done


def _finish(
    ready: _Prepared,
    begun: _Begun,
    journal: Journal,
    rest: list[Path],
    content: str,
    done: Sequence[BlockDone],
    reading: ReadingBack,
    tell: Tell,
) -> Outcome:
    """Assemble, verify, sign, publish."""
    stage, job, model = ready.stage, ready.job, ready.model
    num_blocks = len(ready.chosen)
    made = Made(
        model=model,
        ids_NT=ready.rows.ids_NT,
        journal=journal,
        num_blocks=num_blocks,
        rest=rest,
        behind=[] if stage.behind is None else [journal.tensors_path(num_blocks)],
    )
    refined = stage.refine(job, made, tell) if stage.refine else Refined(parts=made.parts, record={})
    record = _record(ready, done, content, refined)
    verified = assemble(
        journal,
        model,
        begun.run.new_staged(),
        parts=refined.parts,
        config=_config(ready),
        manifest=manifest_of(record, job.source.path, job.lies_at),
        read=reading.found(),
    )
    if stage.proof is not None:
        tell.say("comparing the model as transformers builds it from the new folder")
        stage.proof(model, begun.run.staged, record)
    try:
        _refuse_change(ready)
    except ArtifactError:
        begun.run.discard()
        raise
    begun.run.publish()
    return Outcome(
        out=job.out,
        record=record,
        source_bytes=weight_bytes(model.checkpoint),
        out_bytes=weight_bytes(Checkpoint.open(job.out)),
        verified=verified,
        resumed=sum(step.resumed for step in done),
        notes=[*ready.rows.notes, *refined.notes, *begun.notes, *begun.place.notes],
    )


def _config(ready: _Prepared) -> dict[str, Any]:
    """The new config.json."""
    stage = ready.stage
    config = stage.config(ready.model, ready.written_plan)
    if stage.format is not None:
        config["quantization_config"] = stage.format.config(ready.written_plan)
    return config


def _enters_as_it_is(ready: _Prepared) -> bool:
    """Whether the blocks' files will be the artifact's: then they are read back while later blocks are computed.

    The bound is from above: where it is too high, or a stage refines what was made, all is read at the end as well.
    """
    return ready.stage.refine is None and is_linked(estimated_bytes(ready.model, ready.plan))


def _record(ready: _Prepared, done: Sequence[BlockDone], parent_sha256: str, refined: Refined) -> dict[str, Any]:
    """The stage's record in the manifest."""
    stage, job = ready.stage, ready.job
    return {
        "stage": stage.name,
        "format": stage.format.NAME if stage.format else "dense",
        "options": dict(stage.options),
        "plan": ready.written_plan.to_json(),
        "parent": {"path": path_from(job.lies_at, job.source.path), "sha256": parent_sha256},
        "calibration": ready.rows.to_json(job.lies_at),
        "versions": versions(),
        **stage.record(done, ready.written_plan),
        **refined.record,
        "files_not_carried": not_carried(ready.model.checkpoint.path),
    }


def _found(job: Job, notes: list[str]) -> Outcome:
    """The outcome of a run that another process, or an earlier one, brought to its end."""
    manifest = read_manifest(job.out)
    if manifest is None:
        raise ArtifactError(f"{job.out} has no manifest; pass --force to make it again")
    return Outcome(
        out=job.out,
        record=manifest.record,
        source_bytes=weight_bytes(Checkpoint.open(job.source.path)),
        out_bytes=weight_bytes(Checkpoint.open(job.out)),
        verified=0,
        notes=notes,
    )


# ---- what stages say of a model ------------------------------------------------------------------------


def names_of(model: StreamedModel) -> tuple[list[str], list[str]]:
    """The linears outside the blocks, by the model's names, and those inside, by the checkpoint's; in order."""
    outside = [n for n, m in model.model.named_modules() if is_linear(m) and not n.startswith(model.blocks_name + ".")]
    inside = [model.block_prefix(i) + name for i, block in enumerate(model.blocks) for name in linears(block)]
    return outside, inside


def _of(quantized: Path) -> str:
    """Where the model lies that an artifact's codes were made from: `, PATH`, or nothing where that is not known."""
    manifest = read_manifest(quantized)
    found = next((r for r in manifest.lineage if r["stage"] in ("awq", "int8", "auto")), None) if manifest else None
    if found is None:
        return ""
    try:
        return f", {parent_path(found['parent'], quantized)}"
    except ArtifactError:
        return ""


def refuse_quantized(model: StreamedModel) -> None:
    """UnsupportedError for a model whose weights are integers already."""
    path = model.checkpoint.path
    if "quantization_config" in model.checkpoint.config:
        origin = _of(path)
        raise UnsupportedError(f"{path} is quantized already; pass the full-precision model it was made from{origin}")
    if any(t.dtype.startswith(("I", "U")) and n.endswith(".weight") for n, t in model.checkpoint.tensors.items()):
        raise UnsupportedError(f"{path} holds integer weights; pass the full-precision model they were made from")


def shapes_of(model: StreamedModel, plan: LayerPlan) -> dict[str, tuple[int, int]]:
    """`(out_features, in_features)` of every quantized layer, those outside the blocks first."""
    out = {name: _shape(model.model.get_submodule(name)) for name in outside_of(model, plan)}
    for i, block in enumerate(model.blocks):
        for name, module in linears(block).items():
            full = model.block_prefix(i) + name
            if full in plan and not plan[full].is_dense:
                out[full] = _shape(module)
    return out


def outside_of(model: StreamedModel, plan: LayerPlan) -> list[str]:
    """The quantized linears outside the blocks."""
    return [name for name in names_of(model)[0] if not plan.get(name, DENSE).is_dense]


def _shape(linear: nn.Module) -> tuple[int, int]:
    rows, columns = weight_OI(linear).shape
    return rows, columns


def renumbered(plan: LayerPlan, model: StreamedModel, chosen: Sequence[int]) -> LayerPlan:
    """The plan by the names that layers have once only the `chosen` blocks are left."""
    if list(chosen) == list(range(model.num_blocks)):
        return plan
    old = {model.block_prefix(index): None for index in range(model.num_blocks)}
    new = {
        model.block_prefix(index): model.block_prefix(index).removesuffix(f"{index}.") + f"{position}."
        for position, index in enumerate(chosen)
    }
    layers = {}
    for name, scheme in plan.items():
        prefix = next((p for p in old if name.startswith(p)), None)
        if prefix is None:
            layers[name] = scheme
        elif prefix in new:
            layers[new[prefix] + name.removeprefix(prefix)] = scheme
    return LayerPlan(layers, plan.kv)


def estimated_bytes(model: StreamedModel, plan: LayerPlan) -> int:
    """Bytes of the artifact's weights: packed linears, everything else at two bytes a number. A bound from above."""
    total = 0
    for info in model.checkpoint.tensors.values():
        total += info.num_bytes if info.dtype.startswith(("I", "U")) else 2 * math.prod(info.shape)
    for name, (rows, columns) in shapes_of(model, plan).items():
        weight = plan[name].weight
        if weight is not None:
            packed = rows * columns * weight.num_bits // 8 + rows * weight.groups(columns, name) * (2 + 1)
            total -= 2 * rows * columns - packed
    return total


def not_carried(folder: Path) -> list[str]:
    """Files of the source that an artifact does not take along (its own README, code, other formats)."""
    known = {p.name for p in carried_files(folder)} | {"config.json", MANIFEST}
    names = [p.name for p in folder.iterdir() if p.is_file() and p.name not in known]
    return sorted(name for name in names if ".safetensors" not in name)


def versions() -> dict[str, str]:
    """Versions of what decides the bytes."""
    import numpy
    import safetensors
    import transformers

    return {
        "compress": compress.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "numpy": numpy.__version__,
    }
