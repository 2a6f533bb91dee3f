"""Everything before the first update: models, rows, sizes, memory. Each refusal is one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from compress import distributed, sampling
from compress.artifact import read_manifest
from compress.checkpoint import Checkpoint
from compress.devices import available
from compress.distill import data, held, memory, models, qad, rows, zero
from compress.distill.cache import CachedTeacher
from compress.distill.data import SELF, Mix
from compress.distill.models import LoadedModel
from compress.distill.request import DTYPES, DistillRequest
from compress.distill.rows import Rows
from compress.distill.student import matching_states
from compress.distill.teacher import Lessons, LiveTeacher, NoLessons
from compress.errors import ConfigError
from compress.files import file_sha256, json_bytes, write_bytes_atomically
from compress.shards import save_atomically
from compress.tell import Tell
from compress.tokens import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens of a pass, unless told: what fills a GPU, and what keeps a CPU's memory small.
GPU_PASS_TOKENS, CPU_PASS_TOKENS = 16_384, 4_096
SAMPLED_AT_ONCE = {"cuda": 256, "cpu": 32}


def refuse(request: DistillRequest) -> None:
    """ConfigError for options that do not go together."""
    if request.needs_teacher and request.cache is not None and request.loss != "forward-kl":
        raise ConfigError(
            f"--cache holds samples of the teacher, from which only forward KL is unbiased, and --loss {request.loss} "
            "is asked for; use --loss forward-kl, or leave out --cache"
        )
    if request.cache is not None and (request.hidden or request.on_policy):
        option = "--hidden-loss" if request.hidden else "--on-policy"
        raise ConfigError(f"{option} needs the teacher itself and --cache replaces it; leave out one of the two")
    if not request.needs_teacher and (request.cache is not None or request.hidden or request.on_policy):
        raise ConfigError(
            "--loss cross-entropy trains on the text alone; leave out --cache, --hidden-loss and --on-policy"
        )
    if request.scheme is not None and request.lora is not None:
        raise ConfigError("--lora trains matrices beside the weights and --scheme the weights' codes; leave out one")
    if request.epochs < 1 or request.seq_len < 2:
        raise ConfigError(f"--epochs {request.epochs} --seq-len {request.seq_len}: at least 1 and 2 are needed")


def sizes(request: DistillRequest) -> tuple[int, int]:
    """(rows of a pass, passes of an update) in each process. ConfigError when they do not divide the batch."""
    processes = distributed.num_processes()
    each, left = divmod(request.batch, processes)
    if left or not each:
        raise ConfigError(
            f"--batch {request.batch} rows cannot be shared out to {processes} processes; pass a multiple of "
            f"{processes}"
        )
    if request.micro_batch is None:
        limit = GPU_PASS_TOKENS if request.device.startswith("cuda") else CPU_PASS_TOKENS
        micro = max(m for m in range(1, each + 1) if each % m == 0 and (m == 1 or m * request.seq_len <= limit))
        return micro, each // micro
    if each % request.micro_batch:
        raise ConfigError(
            f"--micro-batch {request.micro_batch} does not divide the {each} rows that each of {processes} processes "
            f"has of --batch {request.batch}; pass a divisor of {each}"
        )
    return request.micro_batch, each // request.micro_batch


# ---- models ------------------------------------------------------------------------------------------


def output_rows(path: Path) -> int:
    """Rows of a folder's output matrix, from its config."""
    config = Checkpoint.open(path).config
    text = config.get("text_config", config)
    return int(text["vocab_size"])


def num_ids(model: Path, vocabulary: int) -> int:
    """Ids that may be drawn: the tokenizer's, not those of a padded vocabulary."""
    return min(vocabulary, len(load_tokenizer(model)))


def parameters_of(path: Path) -> int:
    """Numbers that a folder's tensors hold, from its headers."""
    return sum(math.prod(info.shape) for info in Checkpoint.open(path).tensors.values())


def load_student(request: DistillRequest) -> LoadedModel:
    """Master weights in float32, head proven, at the device."""
    loaded = models.load(
        request.student.path,
        dtype=torch.float32,
        device=request.device,
        trust_remote_code=request.trust_remote_code,
    )
    models.proven_head(loaded)
    qad.check_scheme(loaded, request.scheme)
    if request.scheme is not None:
        qad.learn_codes(loaded)
    loaded.model.requires_grad_(True)
    if request.checkpointing:
        loaded.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return loaded


def load_teacher(request: DistillRequest, dtype: str) -> LoadedModel:
    """At the device; `w8a16` holds codes (see `held.hold`), which is also how a quantized folder is held."""
    kind = DTYPES.get(dtype, DTYPES[request.dtype])
    loaded = models.load(
        request.teacher.path, dtype=kind, device=request.device, trust_remote_code=request.trust_remote_code
    )
    models.proven_head(loaded)
    if dtype == "w8a16":
        held.hold(loaded)
    return loaded


def kept_blocks(student: Path, num_blocks: int) -> list[int] | None:
    """Which of its parent's blocks a pruned student's are, from its manifest; None where that does not say."""
    manifest = read_manifest(student)
    kept = None if manifest is None else manifest.record.get("kept_blocks")
    return [int(i) for i in kept] if isinstance(kept, list) and len(kept) == num_blocks else None


def states(request: DistillRequest, student: LoadedModel, taught: LoadedModel | None) -> tuple[list[int], list[int]]:
    """Hidden states to be matched, of both; empty without `--hidden-loss`."""
    if not request.hidden:
        return [], []
    assert taught is not None
    if student.hidden_size != taught.hidden_size:
        raise ConfigError(
            f"--hidden-loss compares hidden states number by number, and the student's have {student.hidden_size}, the "
            f"teacher's {taught.hidden_size}; leave it out, or prune blocks and not width"
        )
    kept = kept_blocks(student.checkpoint.path, len(student.blocks))
    return matching_states(len(student.blocks), len(taught.blocks), kept)


def teacher_dtype(request: DistillRequest, parameters: int) -> str:
    """`auto`: the dtype of the products, or codes where the teacher's would take more than half of the memory."""
    if request.teacher_dtype != "auto":
        return request.teacher_dtype
    size = parameters * DTYPES[request.dtype].itemsize
    return "w8a16" if size > available(request.device) // 2 else request.dtype


# ---- text --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Texts:
    """rows: to train on. watch: to look at. steps: updates."""

    rows: Rows
    watch: Rows | None
    steps: int


def training_rows(
    request: DistillRequest,
    folder: Path,
    vocabulary: int,
    sample_from: Callable[[], LoadedModel],
    tell: Tell,
) -> Rows:
    """The rows of the request's mix, made once in `folder`; ConfigError when a file changed since they were made."""
    asked = None if request.tokens is None else -(-request.tokens // (request.seq_len * request.epochs))
    if asked == 0:
        raise ConfigError(f"--tokens {request.tokens} is less than one token; pass --tokens 1000000")
    if SELF in request.data.sources and asked is not None:
        count = rows.shares(asked, request.data.weights)[request.data.sources.index(SELF)]
        sample_rows(request, folder.with_name("self"), count, sample_from, tell)
    return once(
        folder,
        request.data,
        lambda: data.build(
            request.data,
            load_tokenizer(request.teacher.path),
            folder,
            num_rows=asked,
            seq_len=request.seq_len,
            vocab_size=vocabulary,
            sample=lambda count: read_sampled(folder.with_name("self")),
        ),
    )


def cached_rows(request: DistillRequest, cached: CachedTeacher, folder: Path, vocabulary: int) -> Rows:
    """The rows that a cache was made of. With `--data`, ConfigError unless that gives the same rows."""
    mine = cached.rows
    if request.data.sources:
        tokenizer = load_tokenizer(request.teacher.path)
        told = distributed.told_by_first(
            lambda: (
                data.build(
                    request.data, tokenizer, folder, num_rows=len(mine), seq_len=mine.seq_len, vocab_size=vocabulary
                ).sha256
            )
        )
        if told != mine.sha256:
            raise ConfigError(
                f"cache {request.cache} was made of another text than --data {' '.join(request.data.sources)} (rows "
                f"{mine.sha256[:12]} and {told[:12]}); leave out --data to train on the cache's own rows, or make a "
                "cache of that text with `compress teach`"
            )
    return mine


def num_steps(request: DistillRequest, found: Rows) -> int:
    """Updates in a run. ConfigError when there are fewer tokens than asked for, or not even one update's."""
    per_step = request.batch * found.seq_len
    asked = request.tokens if request.tokens is not None else len(found) * found.seq_len * request.epochs
    have = len(found) * found.seq_len * request.epochs
    if asked > have + found.seq_len * request.epochs:
        raise ConfigError(
            f"the rows hold {have} tokens in {request.epochs} epochs and --tokens asks for {asked}; pass --tokens "
            f"{have} or --epochs {-(-asked // (len(found) * found.seq_len))}"
        )
    refuse_too_few(asked, request.batch, found.seq_len)
    return asked // per_step


def refuse_too_few(tokens: int, batch: int, seq_len: int) -> None:
    """ConfigError for fewer tokens than one update takes."""
    if tokens < batch * seq_len:
        raise ConfigError(
            f"{tokens} tokens are less than one update of {batch} rows of {seq_len}; pass --tokens {batch * seq_len} "
            "or more, or a smaller --batch"
        )


def watch_rows(request: DistillRequest, folder: Path, vocabulary: int) -> Rows | None:
    if request.watch is None:
        return None
    mix = Mix.of([request.watch], None)
    most = max(distributed.num_processes(), request.watch_tokens // request.seq_len)

    def make() -> Rows:
        tokenizer = load_tokenizer(request.teacher.path)
        return data.build(
            mix, tokenizer, folder, num_rows=most, seq_len=request.seq_len, vocab_size=vocabulary, fewer=True
        )

    return once(folder, mix, make)


def once(folder: Path, mix: Mix, make: Callable[[], Rows]) -> Rows:
    """Make rows in the first process unless an earlier run has; all read them. ConfigError when a file changed."""
    stated = folder.with_suffix(".sources.json")

    def first() -> None:
        now = {s: file_sha256(Path(s)) for s in mix.sources if Path(s).is_file()}
        if rows.is_finished(folder) and stated.exists():
            before = json.loads(stated.read_text(encoding="utf-8"))
            changed = [s for s in now if before.get(s) != now[s]]
            if changed:
                raise ConfigError(
                    f"{changed[0]} changed since the run began, whose rows were cut from it; put it back, or pass "
                    "--no-resume to begin again"
                )
            return
        make()
        write_bytes_atomically(stated, json_bytes(now))

    distributed.first_does(first)
    return rows.read_rows(folder)


def sample_rows(request: DistillRequest, folder: Path, count: int, load: Callable[[], LoadedModel], tell: Tell) -> None:
    """Rows that the teacher writes, in files of a batch each, shared out to the processes; finished ones are kept."""
    at_once = SAMPLED_AT_ONCE[torch.device(request.device).type]
    folder.mkdir(parents=True, exist_ok=True)
    starts = list(range(0, count, at_once))
    missing = [s for s in starts if not _sampled_path(folder, s).exists()]
    if missing:
        tell.say(f"sampling {count} rows of {request.seq_len} tokens from the teacher, token by token")
        model, tokenizer = load().model, load_tokenizer(request.teacher.path)
        tell.start("batch of sampled rows", len(starts))
        for number, start in enumerate(missing):
            if number % distributed.num_processes() == distributed.rank():
                _sample_file(request, folder, start, min(at_once, count - start), model, tokenizer)
            tell.step(len(starts) - len(missing) + number + 1)
    distributed.wait_for_all()


def _sample_file(
    request: DistillRequest, folder: Path, start: int, count: int, model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids_NT = sampling.sample_from_model(
        model,
        tokenizer,
        num_samples=count,
        seq_len=request.seq_len,
        seed=request.seed,
        batch_size=count,
        first_row=start,
    )
    save_atomically(_sampled_path(folder, start), {"ids": ids_NT.to(torch.int32)})


def _sampled_path(folder: Path, start: int) -> Path:
    return folder / f"rows-{start:08d}.safetensors"


def read_sampled(folder: Path) -> Tensor:
    return torch.cat([load_file(p)["ids"].long() for p in sorted(folder.glob("rows-*.safetensors"))])


# ---- lessons and memory ------------------------------------------------------------------------------


def lessons_of(
    request: DistillRequest, taught: LoadedModel | None, cached: CachedTeacher | None, matched: list[int]
) -> Lessons:
    if cached is not None:
        return cached
    return NoLessons() if taught is None else LiveTeacher(taught, matched)


def check_memory(
    request: DistillRequest,
    student: LoadedModel,
    taught: LoadedModel | None,
    held_as: str,
    micro: int,
    shares: int,
    engine: str,
) -> bool:
    """ConfigError when the passes are predicted not to fit what is free beside the weights loaded already.

    Returns whether processes that share weights have room to keep them whole.
    """
    compute = DTYPES[request.dtype]
    token_bytes, kept_bytes = memory.probe(
        student.model, student.base, len(student.blocks), student.hidden_size, compute
    )
    trained = sum(p.numel() for p in student.model.parameters() if p.requires_grad)
    compiled = request.compile and engine != "deepspeed"
    whole = models.num_parameters(student.model)
    needs = memory.Needs(
        trained=trained,
        frozen=whole - trained,
        compute_bytes=compute.itemsize,
        teacher_parameters=0 if taught is None else models.num_parameters(taught.model),
        teacher_bytes=1.01 if held_as == "w8a16" else DTYPES.get(held_as, compute).itemsize,
        tokens=micro * request.seq_len,
        token_bytes=token_bytes * (memory.COMPILED if compiled else 1.0),
        kept_bytes=kept_bytes,
        checkpointing=request.checkpointing,
        shares=shares,
        on_gpu=request.device.startswith("cuda"),
        vocabulary=student.vocab_size,
        at_once=request.compile,
        gathered=min(whole, zero.LIVE) if engine == "deepspeed" else models.gathered_parameters(student),
        teacher_gathered=0 if taught is None else models.gathered_parameters(taught),
    )
    loaded = sum(p.numel() * p.element_size() for p in student.model.parameters())
    if taught is not None:
        loaded += models.held_bytes(taught.model)
    lora = replace(needs, trained=whole // 50, frozen=whole)
    may_cache = request.loss == "forward-kl" and not request.hidden and not request.on_policy
    others = memory.ways_out(needs, seq_len=request.seq_len, lora=lora, may_cache=may_cache)
    free = available(request.device) + loaded
    memory.require(needs, free, others)
    return shares > 1 and distributed.told_by_first(lambda: memory.has_room(needs, free))
