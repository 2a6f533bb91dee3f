"""`compress teach`: what a teacher says about a text, written once and learned from many times. See `cache`.

Parts are files of their own, so that a killed run goes on at the next one, and processes share them out. A row's draws
depend on (seed, row) alone: any number of processes writes the same bytes, up to the rounding of the teacher's
arithmetic.

Shapes: R rows of a part, T tokens in a row
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compress import distributed
from compress.artifact import Manifest, path_from, read_manifest, write_manifest
from compress.distill import cache, models, prepare
from compress.distill.cache import Facts, Settings, Sparse
from compress.distill.data import Mix
from compress.distill.manifest import content, versions
from compress.distill.models import LoadedModel
from compress.distill.request import DistillRequest
from compress.distill.rows import FACTS, ROWS, STARTS, Rows, read_rows
from compress.distill.teacher import LiveTeacher
from compress.files import copy_durably, file_sha256, json_bytes, read_json, write_bytes_atomically
from compress.output import Run, file_read, reserved
from compress.tell import SILENT, Tell
from compress.workspace import Source

# Tokens of a part, about: megabytes each, seconds of a GPU.
PART_TOKENS = 1 << 19


@dataclass(frozen=True, kw_only=True)
class TeachRequest:
    """Everything that decides a cache. tokens: None for all of the text. micro_batch: rows of a pass."""

    teacher: Source
    out: Path
    data: Mix
    tokens: int | None = None
    seq_len: int = 512
    top_k: int = 4
    tail: int = 8
    temperature: float = 1.0
    isolate: bool = False
    seed: int = 0
    dtype: str = "float32"
    teacher_dtype: str = "auto"
    micro_batch: int | None = None
    device: str = "cpu"
    force: bool = False
    resume: bool = True
    trust_remote_code: bool = False

    def options(self) -> dict[str, Any]:
        names = ("tokens", "seq_len", "top_k", "tail", "temperature", "isolate", "seed", "dtype", "teacher_dtype")
        return {
            "data": list(self.data.sources),
            "mix": list(self.data.weights),
            **{name: getattr(self, name) for name in names},
            "device": torch.device(self.device).type,
        }

    def as_distill(self) -> DistillRequest:
        """The same as far as models and rows are concerned."""
        return DistillRequest(
            teacher=self.teacher,
            student=self.teacher,
            out=self.out,
            data=self.data,
            tokens=self.tokens,
            seq_len=self.seq_len,
            seed=self.seed,
            dtype=self.dtype,
            teacher_dtype=self.teacher_dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True, kw_only=True)
class TeachOutcome:
    """What was made: the folder, its record, tokens, bytes on disk a token."""

    out: Path
    record: dict[str, Any]
    tokens: int
    token_bytes: int


def teach(request: TeachRequest, *, tell: Tell = SILENT) -> TeachOutcome:
    """Write the teacher's distributions over a text to `request.out`. Raises CompressError subclasses."""
    with distributed.joined(request.device) as device, ExitStack() as held:
        request = replace(request, device=device)
        reads = {"the teacher": request.teacher.path}
        for source in request.data.sources:
            reads.update(file_read(source))
        place = distributed.first_does(lambda: held.enter_context(reserved(request.out, reads, force=request.force)))
        sha256 = content(request.teacher)

        def start() -> Run:
            assert place is not None
            identity = {"stage": "teach", "teacher": sha256, **request.options(), "versions": versions()}
            return place.start(identity, resume=request.resume)

        run = distributed.first_does(start)
        if distributed.told_by_first(lambda: run is not None and run.is_published()):
            if run is not None:
                run.close()
            return _outcome(request.out)
        scratch = Path(distributed.told_by_first(lambda: str(run.folder if run else "")))
        _write_parts(request, scratch, sha256, tell)
        distributed.first_does(lambda: _publish(run, request, sha256))
        return _outcome(request.out)


def _write_parts(request: TeachRequest, scratch: Path, sha256: str, tell: Tell) -> None:
    same = request.as_distill()
    loaded: list[LoadedModel] = []

    def taught() -> LoadedModel:
        if not loaded:
            size = prepare.parameters_of(request.teacher.path)
            loaded.append(prepare.load_teacher(same, prepare.teacher_dtype(same, size)))
        return loaded[0]

    vocabulary = prepare.output_rows(request.teacher.path)
    rows = prepare.training_rows(same, scratch / "rows", vocabulary, taught, tell)
    settings = _settings(request, vocabulary)
    part_rows = max(1, PART_TOKENS // rows.seq_len)
    starts = range(0, len(rows), part_rows)
    tell.start("part", len(starts))
    limit = prepare.GPU_PASS_TOKENS if request.device.startswith("cuda") else prepare.CPU_PASS_TOKENS
    micro = request.micro_batch or max(1, limit // rows.seq_len)
    for number, start in enumerate(starts):
        path = cache.part_path(scratch, number)
        kept = _is_kept(path)
        if not kept and number % distributed.num_processes() == distributed.rank():
            which = range(start, min(start + part_rows, len(rows)))
            write_bytes_atomically(path, cache.to_bytes(_said(taught(), rows, which, micro, settings), settings))
            write_bytes_atomically(path.with_suffix(".json"), json_bytes({"sha256": file_sha256(path)}))
        tell.step(number + 1, resumed=kept)
    distributed.wait_for_all()


def _settings(request: TeachRequest, vocabulary: int) -> Settings:
    return Settings(
        top_k=request.top_k,
        tail=request.tail,
        temperature=request.temperature,
        seed=request.seed,
        isolate=request.isolate,
        vocabulary=vocabulary,
    )


def _is_kept(path: Path) -> bool:
    stated = path.with_suffix(".json")
    return path.exists() and stated.exists() and read_json(stated)["sha256"] == file_sha256(path)


def _said(loaded: LoadedModel, rows: Rows, which: range, micro: int, settings: Settings) -> Sparse:
    """The teacher's distributions over some rows, cut down, on the CPU."""
    live = LiveTeacher(loaded)
    head = models.head_of(loaded)
    found = []
    for start in range(which.start, which.stop, micro):
        indices = range(start, min(start + micro, which.stop))
        batch = rows.batch(indices, isolate=settings.isolate).to(head.weight_VH.device)
        uniform_P = cache.uniforms(indices, rows.seq_len, settings.seed)
        found.append(cache.cut_down(live.hidden(batch), head, uniform_P, settings).cpu())
    return cache.joined(found)


def _publish(run: Run | None, request: TeachRequest, sha256: str) -> None:
    assert run is not None
    vocabulary = prepare.output_rows(request.teacher.path)
    facts = read_json(run.folder / "rows" / FACTS)
    rows = read_rows(run.folder / "rows")
    staged = run.new_staged()
    parts = sorted(run.folder.glob("part-*.bin"))
    hashes = [read_json(p.with_suffix(".json"))["sha256"] for p in parts]
    for path in (*(run.folder / "rows" / name for name in (ROWS, STARTS, FACTS)), *parts):
        _link(path, staged / path.name)
    told = Facts(
        settings=_settings(request, vocabulary),
        teacher={"path": path_from(request.out, request.teacher.path), "sha256": sha256},
        rows_sha256=rows.sha256,
        part_rows=max(1, PART_TOKENS // rows.seq_len),
        parts=hashes,
    )
    write_bytes_atomically(staged / cache.FACTS, json_bytes(told.to_json()))
    record = {
        "stage": "teach",
        "options": request.options(),
        "parent": dict(told.teacher),
        "data": {"sha256": rows.sha256, "num_rows": len(rows), "sources": facts["sources"]},
        "versions": versions(),
    }
    write_manifest(staged, Manifest(lineage=[record], reports=[]))
    run.publish()


def _link(source: Path, target: Path) -> None:
    """The same file by another name; a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        copy_durably(source, target)


def _outcome(out: Path) -> TeachOutcome:
    manifest = read_manifest(out)
    assert manifest is not None
    facts = cache.read_facts(out)
    rows = manifest.record["data"]["num_rows"]
    tokens = rows * manifest.record["options"]["seq_len"]
    return TeachOutcome(out=out, record=manifest.record, tokens=tokens, token_bytes=facts.settings.token_bytes)
