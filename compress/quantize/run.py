"""`compress awq` from start to end: check, calibrate, stream, assemble. One visible sequence."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import compress
from compress import calibration, distributed, output, sampling, tokens
from compress.artifact import BUNDLED, Manifest, check_files, read_manifest, rebased
from compress.assemble import assemble, write_rest
from compress.background import meanwhile
from compress.block import BlockDone
from compress.blocks import stream
from compress.calibration import CalibrationSet
from compress.checkpoint import Checkpoint, content_of
from compress.disk import check_free_space
from compress.errors import ArtifactError, ConfigError, UnsupportedError
from compress.formats import awq_gemm
from compress.journal import Journal, SharedStore
from compress.linear import is_conv1d, linears, skipped, weight_OI
from compress.model import StreamedModel
from compress.output import Place, Run
from compress.plan import DENSE, LayerPlan, LayerScheme
from compress.quantize.awq_block import STORE_DTYPE, AwqOptions, awq_block, to_stored
from compress.quantize.tune import TuneOptions
from compress.quantized import QuantizedWeight
from compress.scheme import Scheme
from compress.tell import Tell
from compress.workspace import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Calibration rows below which effort `best` adds the model's own text, and the largest model it does that with.
ENOUGH_ROWS = 128
SAMPLED_FROM_BYTES = 4_000_000_000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class AwqRequest:
    """Everything that decides the artifact. samples and seq_len count calibration rows and tokens a row.

    self_samples: rows sampled from the model itself and added to the text; None leaves it to the effort.
    """

    source: Source
    out: Path
    scheme: Scheme
    calib: str | None = None
    samples: int = 128
    seq_len: int = 512
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    skip: tuple[str, ...] = ()
    effort: str = "balanced"
    smooth: bool = True
    clip: bool = True
    tune_steps: int = 200
    self_samples: int | None = None
    force: bool = False
    resume: bool = True
    trust_remote_code: bool = False

    def options(self) -> dict[str, Any]:
        """What the manifest and the resumed run's check record."""
        return {
            "scheme": self.scheme.to_json(),
            "samples": self.samples,
            "seq_len": self.seq_len,
            "seed": self.seed,
            "dtype": self.dtype,
            "device": torch.device(self.device).type,
            "skip": list(self.skip),
            "effort": self.effort,
            "smooth": self.smooth,
            "clip": self.clip,
            "tune_steps": self.tune_steps,
            "self_samples": self.self_samples,
        }


@dataclass(frozen=True, kw_only=True)
class AwqOutcome:
    """What was made: the folder, its record in the manifest, sizes in bytes, tensors verified, blocks resumed."""

    out: Path
    record: dict[str, Any]
    source_bytes: int
    out_bytes: int
    verified: int
    resumed: int = 0
    notes: list[str] = field(default_factory=list)


def quantize_awq(
    request: AwqRequest,
    *,
    on_start: Callable[[int, str], None] = lambda total, text: None,
    on_block: Callable[[BlockDone], None] = lambda done: None,
    on_stage: Callable[[int, str], None] = lambda index, stage: None,
    say: Callable[[str], None] = lambda text: None,
) -> AwqOutcome:
    """Quantize `request.source` to an AutoAWQ gemm folder at `request.out`.

    Under `torchrun`, the processes share the calibration set and the first one writes; all return the outcome. Raises
    CompressError subclasses, each before anything is at `request.out`.
    """
    with distributed.joined(request.device) as device, ExitStack() as held:
        request = replace(request, device=device)
        reads = {"the model": request.source.path, **output.file_read(request.calib)}

        def reserve() -> Place:
            return held.enter_context(output.reserved(request.out, reads, force=request.force))

        place = distributed.first_does(reserve)
        outcome = _quantize(request, place, on_start, on_block, on_stage, say)
        distributed.wait_for_all()
        return outcome or _outcome_of(request.out, request, [])


def _quantize(
    request: AwqRequest,
    place: Place | None,
    on_start: Callable[[int, str], None],
    on_block: Callable[[BlockDone], None],
    on_stage: Callable[[int, str], None],
    say: Callable[[str], None],
) -> AwqOutcome | None:
    """See `quantize_awq`. None, as `place` is, in a process that does not write."""
    out = request.out
    model = StreamedModel.open(
        request.source.path,
        dtype=DTYPES[request.dtype],
        device=request.device,
        trust_remote_code=request.trust_remote_code,
    )
    refuse(model, request)
    if request.effort == "best" and distributed.running():
        raise UnsupportedError(
            f"--effort best tunes each block on all rows in one process, and {distributed.num_processes()} were "
            "started; start one, or use --effort balanced"
        )
    # One process reads: several that read might find different rows.
    texts, ids_NT, notes = distributed.told_by_first(lambda: calibration_rows(request, model, say))
    stamp = model.checkpoint.stamp()

    def begin() -> tuple[Run, str]:
        assert place is not None
        # Finished blocks, their merged copy and the tensors around them exist side by side at the end.
        check_free_space(place.real.parent, 2 * estimated_bytes(model, request) + 64_000_000)
        checked = check_files(model.checkpoint.path)
        notes.extend(filter(None, [checked.note]))
        parent_sha256 = content_of(checked.hashes, model.checkpoint.content_files())
        identity = {
            "stage": "awq",
            "content": parent_sha256,
            **request.options(),
            "calibration": tokens.ids_sha256(ids_NT),
            "versions": versions(),
        }
        return place.start(identity, resume=request.resume), parent_sha256

    run, parent_sha256 = distributed.first_does(begin) or (None, "")
    if distributed.told_by_first(lambda: run is not None and run.is_published()):
        if run:
            run.close()
        return _outcome_of(out, request, ["an earlier run had finished this artifact; nothing was left to do"])
    on_start(model.num_blocks, texts.source)
    options = AwqOptions(
        scheme=request.scheme,
        effort=request.effort,
        skip=request.skip,
        smooth=request.smooth,
        clip=request.clip,
        tune=TuneOptions(steps=request.tune_steps, seed=request.seed),
    )
    method = partial(awq_block, options=options)
    journal = Journal(run.folder, run.id, request.scheme, awq_gemm.tensors, _read, awq_gemm.LEAVES) if run else None
    with ExitStack() as threads:
        if journal:  # needs no blocks, so it is done while those are computed
            written_rest = threads.enter_context(meanwhile(partial(write_rest, journal, model, to_stored)))
        done = []
        for step in stream(model, ids_NT, method, SharedStore(journal), paths=options.paths, tell=_Stages(on_stage)):
            done.append(step)
            on_block(step)
        if place is None or run is None or journal is None:
            return None
        rest = written_rest()
    record = {
        "stage": "awq",
        "format": "awq-gemm",
        "options": request.options(),
        "parent": {"path": _parent_path(request), "sha256": parent_sha256},
        "calibration": {
            **texts.record(),
            **_calibration_path(texts.source, out),
            "num_sampled_from_model": len(ids_NT) - len(texts.ids_NT),
        },
        "versions": versions(),
        "layers": [layer for step in done for layer in step.report["layers"]],
        "groups": [{"block": step.index, **group} for step in done for group in step.report["groups"]],
        "tuning": [{"block": step.index, **step.report["tuning"]} for step in done if "tuning" in step.report],
        "left_in_float16": left_dense(model, request),
        "files_not_carried": not_carried(model.checkpoint.path),
    }
    earlier = read_manifest(request.source.path)
    before = rebased(earlier.lineage, request.source.path, out) if earlier else []
    manifest = Manifest(lineage=[record, *before], reports=[])
    config = out_config(model.checkpoint, request, left_dense(model, request))
    verified = assemble(journal, model, run.new_staged(), rest=rest, config=config, manifest=manifest)
    if model.checkpoint.stamp() != stamp:
        run.discard()
        raise ArtifactError(f"{request.source.path} was changed while it was read; run the same command again")
    run.publish()
    return AwqOutcome(
        out=out,
        record=record,
        source_bytes=_weight_bytes(model.checkpoint),
        out_bytes=_weight_bytes(Checkpoint.open(out)),
        verified=verified,
        resumed=sum(step.resumed for step in done),
        notes=[*notes, *place.notes],
    )


def request_from_record(
    record: Mapping[str, Any], folder: Path, *, source: Source, out: Path, scheme: Scheme
) -> AwqRequest:
    """The request that made the artifact in `folder`, as its manifest's `record` tells it, with another scheme.

    `source` is its parent. Raises ArtifactError when the record holds an option that this version does not know, or
    when the calibration text is gone.
    """
    options: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in record["options"].items() if k != "scheme"
    }
    unknown = sorted(set(options) - {f.name for f in fields(AwqRequest)})
    if record.get("stage") != "awq" or unknown:
        what = f"option {unknown[0]}" if unknown else f"stage {record.get('stage')!r}"
        raise ArtifactError(
            f"{folder}: its manifest records {what}, which this version cannot run again; quantize its parent "
            f"{record['parent']['path']} yourself with `compress awq`"
        )
    calib = _recorded_calibration(record, folder)
    return AwqRequest(source=source, out=out, scheme=scheme, calib=calib, **options)


def _calibration_path(source: str, out: Path) -> dict[str, str]:
    """Where a calibration file lies, relative to the artifact, so that the recipe can be run again from anywhere."""
    if not source.startswith("file:"):
        return {}
    return {"path": os.path.relpath(Path(source.removeprefix("file:")).resolve(), out.resolve())}


def _recorded_calibration(record: Mapping[str, Any], folder: Path) -> str | None:
    """What to pass as `calib` to get the recorded calibration set again."""
    calibration_record = record["calibration"]
    name = str(calibration_record["source"])
    if name.startswith("bundled:"):
        return None  # the default of the bundled model, which the parent then is
    if not name.startswith("file:"):
        return name  # self, or hf:...
    asked = Path(name.removeprefix("file:"))
    recorded = calibration_record.get("path")
    found = Path(folder, recorded).resolve() if recorded else asked.resolve()
    path = asked if asked.resolve() == found else Path(os.path.relpath(found))
    if not path.is_file():
        raise ArtifactError(
            f"{folder} was calibrated on {asked}, which is not there any more; put it back at {path}, or quantize "
            f"{record['parent']['path']} again with `compress awq --calib FILE`"
        )
    return str(path)


def calibration_rows(
    request: AwqRequest, model: StreamedModel, say: Callable[[str], None]
) -> tuple[CalibrationSet, Tensor, list[str]]:
    """What the text gives, all rows to calibrate on (`with_own_text`), and notes."""
    tokenizer = tokens.load_tokenizer(request.source.path, trust_remote_code=request.trust_remote_code)
    texts = calibration.load(
        request.calib,
        tokenizer,
        num_samples=request.samples,
        seq_len=request.seq_len,
        seed=request.seed,
        model=request.source.path,
        is_reference=request.source.is_reference,
        vocab_size=model.vocab_size,
        device=request.device,
        trust_remote_code=request.trust_remote_code,
        tell=_Said(say),
    )
    return texts, *with_own_text(request, model.checkpoint, tokenizer, texts, say)


def with_own_text(
    request: AwqRequest,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    texts: calibration.CalibrationSet,
    say: Callable[[str], None],
) -> tuple[Tensor, list[str]]:
    """The calibration rows and, behind them, rows sampled from the model itself; and what to tell the user.

    Tuning a block on little text fits that text. What the model writes itself costs no text and is what the model
    knows, so effort `best` tops a short calibration set up to `ENOUGH_ROWS`, unless told otherwise or the model is too
    large to be sampled from (sampling holds all of it in memory).
    """
    asked, ids_NT = request.self_samples, texts.ids_NT
    if asked is None:
        wants_more = request.effort == "best" and texts.source != "self"
        asked = max(0, ENOUGH_ROWS - len(ids_NT)) if wants_more else 0
        size = _weight_bytes(checkpoint)
        if asked and size > SAMPLED_FROM_BYTES:
            note = (
                f"the model ({size / 1e9:.1f} GB) was not sampled from for more calibration text: that holds all of it "
                f"in memory; give more text, or pass --self-samples {asked} if it fits"
            )
            return ids_NT, [note]
    if not asked:
        return ids_NT, []
    if texts.source == "self":
        raise ConfigError(
            "--self-samples adds to a text, but all rows are sampled from the model itself already; raise --samples"
        )
    say(f"sampling {asked} rows of {ids_NT.shape[1]} tokens from the model itself, token by token")
    own_NT = sampling.sample_from_model(
        sampling.load_model_float32(request.source.path, request.device),
        tokenizer,
        num_samples=asked,
        seq_len=ids_NT.shape[1],
        seed=request.seed,
    )
    note = f"calibrated on {len(ids_NT)} rows of the text and {asked} sampled from the model itself"
    return torch.cat([ids_NT, own_NT]), [note]


def refuse(model: StreamedModel, request: AwqRequest) -> None:
    """Say no, in one sentence, to what the format or the method cannot do, before any work is done."""
    path = model.checkpoint.path
    if "quantization_config" in model.checkpoint.config:
        raise UnsupportedError(f"{path} is quantized already; pass the full-precision model it was made from")
    if any(t.dtype.startswith(("I", "U")) and n.endswith(".weight") for n, t in model.checkpoint.tensors.items()):
        raise UnsupportedError(f"{path} holds integer weights; pass the full-precision model they were made from")
    names = [model.block_prefix(i) + n for i in range(model.num_blocks) for n in linears(model.blocks[i])]
    unused = [p for p in request.skip if not any(skipped(n, [p]) for n in names)]
    if unused:
        raise ConfigError(f"--skip {unused[0]} matches no layer; layers are called like {names[0]}")
    if all(skipped(n, request.skip) for n in names):
        raise ConfigError(f"--skip leaves nothing to quantize: it matches all {len(names)} layers of the blocks")
    shapes = {}
    for i, block in enumerate(model.blocks):
        for name, module in linears(block).items():
            full = model.block_prefix(i) + name
            if skipped(full, request.skip):
                continue
            if is_conv1d(module):
                raise UnsupportedError(
                    f"{full} is a transformers Conv1D (GPT-2's transposed linear), which AutoAWQ readers leave "
                    "as it is, so they could not load the folder; use a model built of nn.Linear"
                )
            shapes[full] = (weight_OI(module).shape[0], weight_OI(module).shape[1])
    awq_gemm.check(LayerPlan.uniform(shapes, LayerScheme(weight=request.scheme)), shapes)


def _read(parts: Mapping[str, Tensor], scheme: Scheme, name: str) -> QuantizedWeight:
    return awq_gemm.read(parts, LayerScheme(weight=scheme), name)


def left_dense(model: StreamedModel, request: AwqRequest) -> list[str]:
    """Linears that stay in float16: those skipped by the user, and those outside the blocks (the output matrix)."""
    from compress.linear import is_linear

    outside = [n for n, m in model.model.named_modules() if is_linear(m) and not n.startswith(model.blocks_name + ".")]
    inside = [
        model.block_prefix(i) + name
        for i, block in enumerate(model.blocks)
        for name in linears(block)
        if skipped(model.block_prefix(i) + name, request.skip)
    ]
    return outside + inside


def out_config(checkpoint: Checkpoint, request: AwqRequest, not_converted: list[str]) -> dict[str, Any]:
    """The source's config.json with the quantization stated and float16 as its dtype."""
    config = dict(checkpoint.config)
    config.pop("torch_dtype", None)
    config["dtype"] = str(STORE_DTYPE).removeprefix("torch.")
    config["quantization_config"] = awq_gemm.config(
        LayerPlan({**dict.fromkeys(not_converted, DENSE), "*": LayerScheme(weight=request.scheme)})
    )
    return config


def estimated_bytes(model: StreamedModel, request: AwqRequest) -> int:
    """Bytes of the artifact's weights: packed linears, everything else at two bytes a number."""
    total = sum(info.num_bytes for info in model.checkpoint.tensors.values() if info.dtype.startswith(("I", "U")))
    total += sum(2 * _numel(i.shape) for i in model.checkpoint.tensors.values() if not i.dtype.startswith(("I", "U")))
    scheme = request.scheme
    for i, block in enumerate(model.blocks):
        for name, module in linears(block).items():
            if not skipped(model.block_prefix(i) + name, request.skip):
                numel = weight_OI(module).numel()
                groups = numel // scheme.group_size
                total -= 2 * numel - (numel * scheme.num_bits // 8 + groups * (2 + 1))
    return total


def not_carried(folder: Path) -> list[str]:
    """Files of the source that the artifact does not take along (its own README, code, other formats)."""
    from compress.artifact import carried_files

    known = {p.name for p in carried_files(folder)}
    weights = ("config.json", "compress.json")
    return sorted(
        p.name
        for p in folder.iterdir()
        if p.is_file() and p.name not in known and p.name not in weights and ".safetensors" not in p.name
    )


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


def _parent_path(request: AwqRequest) -> str:
    """The parent as the manifest names it: bundled, or relative to the artifact so that a workspace can move."""
    import calibration_data

    path = request.source.path.resolve()
    if path == calibration_data.reference_model().resolve():
        return BUNDLED
    return os.path.relpath(path, request.out.resolve())


def _outcome_of(out: Path, request: AwqRequest, notes: list[str]) -> AwqOutcome:
    """The outcome of a run that another process, or an earlier one, brought to its end."""
    manifest = read_manifest(out)
    if manifest is None:
        raise ArtifactError(f"{out} has no manifest; pass --force to make it again")
    return AwqOutcome(
        out=out,
        record=manifest.record,
        source_bytes=_weight_bytes(Checkpoint.open(request.source.path)),
        out_bytes=_weight_bytes(Checkpoint.open(out)),
        verified=0,
        notes=notes,
    )


class _Said(Tell):
    """Tells of what goes on before the blocks in lines, a tenth of it at a time."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say  # type: ignore[method-assign,assignment]
        self.total = 0

    def start(self, what: str, total: int) -> None:
        self.what, self.total, self.started = what, total, time.monotonic()

    def step(self, done: int | None = None, doing: str = "", **_: Any) -> None:
        if done and self.total and done * 10 // self.total > (done - 1) * 10 // self.total:
            left = (time.monotonic() - self.started) / done * (self.total - done)
            self.say(f"{self.what} {done}/{self.total}, about {left:.0f} s left")


class _Stages(Tell):
    def __init__(self, on_stage: Callable[[int, str], None]) -> None:
        self.on_stage = on_stage

    def step(
        self,
        done: int | None = None,
        doing: str = "",
        *,
        found: Mapping[str, Any] | None = None,
        resumed: bool = False,
    ) -> None:
        self.on_stage(0, doing)


def _weight_bytes(checkpoint: Checkpoint) -> int:
    return sum(info.num_bytes for info in checkpoint.tensors.values())


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total
