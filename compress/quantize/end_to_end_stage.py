"""`end_to_end` for a run of the driver: whether the model fits, what is loaded, what is written.

The one place where quantizing holds a whole model: the original in float32, then, in its place, the quantized one,
whose blocks are read back from the run's journal. What was learned is a second journal beside the first, so that a
killed run finds it whole or learns it again, with the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from compress.block import BlockResult
from compress.devices import available
from compress.errors import ConfigError
from compress.files import file_sha256
from compress.journal import Facts, Journal, read_record, write_record
from compress.linear import is_linear, linears, parameter
from compress.losses.heads import proven_head
from compress.model import StreamedModel
from compress.quantize.end_to_end import (
    CPU_LOGITS,
    GPU_LOGITS,
    TOGETHER,
    EndToEndOptions,
    Student,
    Trained,
    lessons,
    train,
)
from compress.sampling import rows_at_once, sample_from_model
from compress.shards import save_atomically, tensor_sha256
from compress.stage import DTYPES, Job, Made, Refined
from compress.tell import Tell
from compress.tokens import load_tokenizer

ROWS = 8
# What `best` does on a GPU unasked, and the model's own rows that it then learns from beside those of the blocks: all
# parts chosen on text that no table reports (METHODS.md).
UPDATES, OWN_ROWS = 400, 512
# Bytes that a backward pass may keep of all blocks; beyond, blocks compute them again.
KEPT_ON_CPU, KEPT_ON_GPU = 2_000_000_000, 24_000_000_000
_MARGIN = 1.2


@dataclass(frozen=True, kw_only=True)
class Asked:
    """updates: at least one. seed: of the rows' order, and of sampling. own_rows: sampled from the model beside those
    that the blocks were calibrated on."""

    updates: int
    seed: int
    group_size: int
    own_rows: int = 0


def refine(asked: Asked, job: Job, made: Made, tell: Tell) -> Refined:
    """Learn codes, scales and norms of the finished blocks through the whole model, and keep them if that helped."""
    why = too_large(asked, job, made.model, rows=len(made.ids_NT), seq_len=made.ids_NT.shape[1])
    if len(made.ids_NT) + asked.own_rows < 2:
        why = "there is one calibration row, and rows to learn from and to judge by are two"
    if why:  # said, not raised: the blocks are done
        note = f"codes, scales and norms were not learned through the whole model: {why}"
        return Refined(parts=made.parts, record={"end_to_end": {"left_out": why}}, notes=[note])
    journal = made.journal
    folder = journal.folder / "end-to-end"
    folder.mkdir(exist_ok=True)
    learned = replace(made, journal=Journal(folder, journal.run, journal.format, journal.plan))
    facts = Facts(folder, journal.run)
    found = facts.known("end to end")
    if found is None or not _all_there(learned, found["rest"]):
        options = EndToEndOptions(
            updates=asked.updates,
            rows=ROWS,
            seed=asked.seed,
            dtype=DTYPES[job.dtype],
            checkpointing=_checkpoints(made.model, ROWS * made.ids_NT.shape[1]),
        )
        found = facts.keep("end to end", _learned(asked, options, job, made, learned, tell))
    record = {"end_to_end": found["report"]}
    if not found["report"]["kept"]:
        return Refined(parts=made.parts, record=record)
    rest = [folder / path.name if path.name in found["rest"] else path for path in made.rest]
    return Refined(parts=replace(learned, rest=rest).parts, record=record)


def _learned(asked: Asked, options: EndToEndOptions, job: Job, made: Made, learned: Made, tell: Tell) -> dict[str, Any]:
    """Train, and write what came out where `learned` has its journal.

    Returns the report, and the names of those files of what lies outside the blocks that were written anew.
    """
    tell.say("learning codes, scales and norms through the whole model, from the original's predictions")
    opened = StreamedModel.open(
        job.source.path, dtype=torch.float32, device=job.device, trust_remote_code=job.trust_remote_code
    )
    opened.load_whole()
    head = proven_head(opened.model, opened.base, job.source.path)
    ids_NT = torch.cat([made.ids_NT, *_own_rows(asked, job, opened, made.ids_NT, tell)])
    taught = lessons(opened.base, head, ids_NT, options.rows, options.dtype)
    blocks = [_block(made.journal, index) for index in range(made.num_blocks)]
    outside = _outside(made.rest)
    student = student_of(opened, blocks, {name: value for _, name, value in outside})
    trained = train(student, taught, options, tell)
    report = {
        "updates": options.updates,
        "rows": options.rows,
        "rate": options.rate,
        "code_rate": options.code_rate,
        "own_rows": asked.own_rows,
        "held_out_rows": trained.held_out_rows,
        "held_out_kl": float(f"{trained.divergences[0]:.6g}"),
        "held_out_kl_learned": float(f"{trained.divergences[1]:.6g}"),
        "kept": trained.kept,
    }
    if not trained.kept:
        return {"report": report, "rest": []}
    for index, block in enumerate(blocks):
        learned.journal.save(index, made.model.block_prefix(index), _with_learned(opened, index, block, trained))
    rest = _save_outside(opened, outside, trained, learned.journal)
    return {"report": report, "rest": rest}


def _own_rows(asked: Asked, job: Job, opened: StreamedModel, ids_NT: Tensor, tell: Tell) -> list[Tensor]:
    """Rows sampled from the loaded model, other ones than may be among the rows of the blocks."""
    if not asked.own_rows:
        return []
    tell.say(f"sampling {asked.own_rows} rows of {ids_NT.shape[1]} tokens from the model itself")
    tokenizer = load_tokenizer(job.source.path, trust_remote_code=job.trust_remote_code)
    return [
        sample_from_model(
            opened.model, tokenizer, num_samples=asked.own_rows, seq_len=ids_NT.shape[1], seed=asked.seed,
            batch_size=rows_at_once(opened.model, ids_NT.shape[1]), first_row=len(ids_NT), chat=True, tell=tell,
        )
    ]  # fmt: skip


# ---- whether it fits ------------------------------------------------------------------------------------


def require_room(asked: Asked, job: Job, model: StreamedModel, *, rows: int, seq_len: int) -> None:
    """ConfigError where the model does not fit. rows: that the blocks are calibrated on."""
    why = too_large(asked, job, model, rows=rows, seq_len=seq_len)
    if why:
        raise ConfigError(f"--end-to-end {asked.updates}: {why}; leave it out, or pass fewer --samples")


def too_large(asked: Asked, job: Job, model: StreamedModel, *, rows: int, seq_len: int) -> str:
    """Why the model does not fit, or nothing."""
    tokens = (rows + asked.own_rows) * seq_len
    need, free = bytes_needed(model, asked.group_size, tokens, ROWS * seq_len), available(job.device)
    if need <= free:
        return ""
    return f"the whole model is predicted to need {need / 1e9:.1f} GB of memory and {free / 1e9:.1f} are free"


def bytes_needed(model: StreamedModel, group_size: int, tokens: int, batch: int) -> int:
    """Memory that the step takes: the model in float32, a second table of embeddings, codes and scales with gradients
    and moments, the original's last hidden states of all `tokens`, and what a pass over `batch` tokens keeps."""
    numbers = sum(p.numel() for p in model.model.parameters())
    vocabulary, hidden = model.embedding.weight.shape
    in_blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    learned = sum(in_blocks) + sum(in_blocks) // max(1, group_size)
    on_gpu = model.device.type == "cuda"
    per_block = batch * _kept_numbers(model.blocks[0])
    kept = per_block * model.num_blocks
    if _checkpoints(model, batch):
        kept = batch * hidden * model.num_blocks + per_block
    kept += 2 * sum(in_blocks) + 6 * min(TOGETHER, sum(in_blocks))  # weights with gradients, and what makes them
    loss = 6 * (GPU_LOGITS if on_gpu else CPU_LOGITS)
    return int(_MARGIN * 4 * (numbers + vocabulary * hidden + 4 * learned + tokens * hidden + kept + loss))


def _kept_numbers(block: nn.Module) -> int:
    """Numbers of a token that a backward pass through the block keeps, about: what enters and leaves its linears, and
    as much again for what lies between."""
    return 2 * sum(sum(parameter(module, "weight").shape) for module in linears(block).values())


def _checkpoints(model: StreamedModel, batch: int) -> bool:
    most = KEPT_ON_GPU if model.device.type == "cuda" else KEPT_ON_CPU
    return 4 * batch * _kept_numbers(model.blocks[0]) * model.num_blocks > most


# ---- from files to a model, and back ----------------------------------------------------------------------


def _block(journal: Journal, index: int) -> BlockResult:
    result = journal.load(index)
    if result is None:
        raise ConfigError(f"{journal.tensors_path(index)} was lost while the run worked; run the same command again")
    return result


def _outside(paths: Iterable[Path]) -> list[tuple[Path, str, Tensor]]:
    """What lies outside the blocks as the artifact will hold it: file, name in the folder, tensor."""
    found = []
    for path in paths:
        with safe_open(path, "pt") as file:
            found += [(path, name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118
    return found


@torch.no_grad()
def student_of(opened: StreamedModel, blocks: list[BlockResult], outside: dict[str, Tensor]) -> Student:
    """The loaded model with the artifact's weights in the place of its own.

    The output matrix that a lesson's head holds stays what it was: tensors are exchanged, not overwritten.
    """
    for name, value in opened.model.named_parameters():
        stored = outside.get(opened.source_name(name))
        if stored is not None and not torch.equal(stored.to(value), value):
            value.data = stored.to(value.device, value.dtype)
    norms = {
        name: outside[opened.source_name(f"{name}.weight")]
        for name, module in opened.model.named_modules()
        if not name.startswith(opened.blocks_name + ".") and is_norm(module)
    }
    layers = {}
    for index, (block, result) in enumerate(zip(opened.blocks, blocks, strict=True)):
        prefix = f"{opened.blocks_name}.{index}."
        layers.update({prefix + name: weight for name, weight in result.quantized.items()})
        for name, value in block.named_parameters():
            if name in result.dense:
                value.data = result.dense[name].to(value.device, value.dtype)
        norms.update(
            {prefix + n: result.dense[f"{n}.weight"] for n, module in block.named_modules() if is_norm(module)}
        )
    return Student(
        base=opened.base,
        head=proven_head(opened.model, opened.base, opened.checkpoint.path),
        blocks=opened.blocks,
        model=opened.model,
        layers=layers,
        norms=norms,
    )


def is_norm(module: nn.Module) -> bool:
    """Whether the module multiplies channels by a weight, as norms do."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 1 and not is_linear(module)


def _with_learned(opened: StreamedModel, index: int, block: BlockResult, trained: Trained) -> BlockResult:
    prefix = f"{opened.blocks_name}.{index}."
    norms = {f"{name.removeprefix(prefix)}.weight": v for name, v in trained.norms.items() if name.startswith(prefix)}
    return BlockResult(
        quantized={name: trained.layers[prefix + name] for name in block.quantized},
        dense={**block.dense, **norms},
        inputs=block.inputs,
        report={},
    )


def _save_outside(
    opened: StreamedModel, outside: list[tuple[Path, str, Tensor]], trained: Trained, journal: Journal
) -> list[str]:
    """Write the learned norms outside the blocks. Returns the names of the files whose place they take."""
    by_name = {opened.source_name(f"{name}.weight"): value for name, value in trained.norms.items()}
    written = []
    for old, name, _ in outside:
        if name not in by_name:
            continue
        path = journal.folder / old.name
        save_atomically(path, {name: by_name[name]})
        facts = {"name": name, "sha256": file_sha256(path), "meant": {name: tensor_sha256(by_name[name])}}
        write_record(path.with_suffix(".json"), journal.run, facts)
        written.append(old.name)
    return written


def _all_there(learned: Made, rest: list[str]) -> bool:
    """Whether every file that an earlier process wrote of what was learned is there, and whole."""
    if not rest:  # it was not kept, so nothing was written
        return True
    journal = learned.journal
    blocks = all(journal.record(index) is not None for index in range(learned.num_blocks))
    return blocks and all(
        read_record((path := journal.folder / name).with_suffix(".json"), journal.run, path) is not None
        for name in rest
    )
