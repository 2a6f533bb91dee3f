"""`compress prune` as a stage: what the user asks for, what is measured first, what the driver is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import distributed, stage
from compress.artifact import parent_path, read_manifest
from compress.assemble import Cut as RestCut
from compress.block import BlockDone, BlockResult, LoadedBlock
from compress.calibration_rows import Rows
from compress.errors import ArtifactError, UnsupportedError
from compress.journal import Facts
from compress.model import StreamedModel
from compress.plan import LayerPlan
from compress.prune.cut import Cut, needs_structure, plan_cut
from compress.prune.decide import Asked, decide, find_whole_structure
from compress.prune.judge import WANTED, final_divergence, reshaping_of, stored_dtype
from compress.prune.kinds import Kinds
from compress.prune.prune_block import PruneOptions, prune_block
from compress.prune.shape import Counter, Shape, config_of, shape_of, stored_parameters
from compress.request import CalibratedRequest
from compress.stage import Outcome, Stage
from compress.tell import SILENT, Tell

# Above this share of the blocks, what reads multiple choice well may no longer write.
MUCH_DEPTH = 0.2


@dataclass(frozen=True, kw_only=True)
class PruneRequest(CalibratedRequest):
    """Everything that decides the artifact; `asked` says what goes.

    max_kl: nats a token above which the user is told to distill; the goal itself where `asked` names no other.
    """

    asked: Asked
    max_kl: float | None = None
    repair: bool = True

    @property
    def tops_up(self) -> bool:
        """What is fitted to a text of one kind is worse on others; a text of the model's own is all kinds that it
        knows, and needs no more of them."""
        return self.calib is not None

    def options(self) -> dict[str, Any]:
        """What the manifest and the resumed run's check record."""
        return {
            **self.asked.to_json(),
            "repair": self.repair,
            "samples": self.samples,
            "self_samples": self.self_samples,
            "seq_len": self.seq_len,
            "seed": self.seed,
            "dtype": self.dtype,
            "device": torch.device(self.device).type,
        }


def prune(request: PruneRequest, tell: Tell = SILENT, rows: Rows | None = None) -> Outcome:
    """Prune `request.source` to an ordinary model folder at `request.out`; see `stage.run`.

    rows: those that the request's texts give, where they were read already.
    """
    outcome = stage.run(prune_stage(request), replace(request.job(), rows=rows), tell)
    return replace(outcome, notes=[*outcome.notes, *warnings(outcome.record, request.max_kl)])


def warnings(record: Mapping[str, Any], max_kl: float | None) -> list[str]:
    """What the user must know of what was made before it is used."""
    before, after = Shape.from_json(record["shape"]["before"]), Shape.from_json(record["shape"]["after"])
    out = []
    gone = before.blocks - after.blocks
    if gone > MUCH_DEPTH * before.blocks:
        out.append(
            f"{gone} of {before.blocks} blocks went, more than {MUCH_DEPTH:.0%}: such models still choose well and "
            "write badly, so gate a task that generates (compress evaluate --tasks), not multiple choice alone"
        )
    found = record["divergence"]["held_out"]
    if max_kl is not None and found is not None and found > max_kl:
        out.append(
            f"its KL divergence on text held out is {found:.3f}, above --max-kl {max_kl:g}: not to be used before "
            "`compress distill` has brought it back"
        )
    return out


def prune_stage(request: PruneRequest) -> Stage:
    """The stage that a request asks for: it measures first."""
    return Stage(
        name="prune",
        options=request.options(),
        plan=partial(plan_of, request),
        block=_undecided,
        config=_undecided,
        record=_undecided,
        paths=2,
        wants=WANTED,
        measure=partial(_measure, request),
        decided=partial(_decided, request),
    )


def _undecided(*_: Any) -> Any:
    raise AssertionError("a stage that measures first is replaced by what it decides")


def plan_of(request: PruneRequest, model: StreamedModel) -> LayerPlan:
    """Every linear stays dense. Says no, in one sentence, to what cannot be pruned, before any work is done."""
    refuse(model)
    if distributed.running():
        raise UnsupportedError(
            f"compress prune judges whole models in one process, and {distributed.num_processes()} were started; start "
            "it without torchrun"
        )
    request.asked.check(model)
    outside, inside = stage.names_of(model)
    return LayerPlan.dense([*outside, *inside])


def refuse(model: StreamedModel) -> None:
    """UnsupportedError for a model that is quantized, and for one that was pruned last."""
    stage.refuse_quantized(model)
    manifest = read_manifest(model.checkpoint.path)
    if manifest is not None and manifest.record["stage"] == "prune":
        parent = manifest.record["parent"]["path"]
        with suppress(ArtifactError):  # gone: as it was called
            parent = parent_path(manifest.record["parent"], model.checkpoint.path)
        raise UnsupportedError(
            f"{model.checkpoint.path} is pruned already; prune what it was made from ({parent}) by more, or distill it "
            "first"
        )


def _measure(request: PruneRequest, model: StreamedModel, rows: Rows, facts: Facts, tell: Tell) -> Mapping[str, Any]:
    options = PruneOptions(repair=request.repair)
    return decide(request.asked, model, rows.ids_NT, Kinds.of(rows), options, facts, tell)


def _decided(request: PruneRequest, model: StreamedModel, found: Mapping[str, Any]) -> Stage:
    """The stage once it is known which shape is made."""
    shape = Shape.from_json(found["shape"])
    channels = None if found["channels"] is None else torch.tensor(found["channels"])
    structure = find_whole_structure(model) if request.repair or needs_structure(shape_of(model), shape) else None
    cut = plan_cut(model, shape, found["kept"], structure, channels)
    cut = replace(cut, final_scale=found["final_scale"])
    counter = Counter(model)
    facts = {
        "shape": {"before": cut.old.to_json(), "after": shape.to_json()},
        "parameters": {"before": counter.parameters(cut.old), "after": counter.parameters(shape)},
        "kept_blocks": list(cut.kept),
        "removed_blocks": [i for i in range(cut.old.blocks) if i not in cut.kept],
        "kept_channels": found["channels"],
        "depth": found["depth"],
        "search": found["search"],
    }
    return replace(
        prune_stage(request),
        block=partial(_block, model, cut, request, Kinds.from_json(found["kinds"])),
        config=lambda model, plan: config_of(model, shape, cut.kept),
        record=partial(_record, facts),
        blocks=lambda model: cut.kept,
        reshaping=reshaping_of(cut),
        cut=partial(_rest_cut, _rest_axes(model, cut), channels),
        stored=partial(_rest_stored, _final_norms(model, cut), cut.final_scale),
        proof=partial(prove, trust_remote_code=request.trust_remote_code),
    )


def _block(
    model: StreamedModel, cut: Cut, request: PruneRequest, kinds: Kinds, loaded: LoadedBlock, plan: LayerPlan
) -> BlockResult:
    """A block of the run that is written; the last one also says how far the whole model is from the original."""
    options = PruneOptions(repair=request.repair, fitted=kinds.fitted)
    result = prune_block(loaded, cut, options, stored_dtype(model, loaded.index))
    if loaded.index == cut.kept[-1]:
        result.report["divergence"] = final_divergence(model, loaded, result, cut, kinds)
    return result


def _record(facts: Mapping[str, Any], done: Sequence[BlockDone], plan: LayerPlan) -> dict[str, Any]:
    return {
        **facts,
        "divergence": done[-1].report["divergence"],
        "blocks": [{k: v for k, v in step.report.items() if k != "divergence"} for step in done],
    }


# ---- around the blocks ---------------------------------------------------------------------------------


def _rest_axes(model: StreamedModel, cut: Cut) -> dict[str, tuple[int, ...]]:
    """Hidden axes of the tensors outside the blocks, by the checkpoint's names."""
    outside = {n for n, _ in model.model.named_parameters() if not n.startswith(f"{model.blocks_name}.")}
    return {model.source_name(name): axes for name, axes in cut.hidden_axes.items() if name in outside}


def _rest_cut(
    axes: Mapping[str, tuple[int, ...]], channels: Tensor | None, name: str, shape: tuple[int, ...]
) -> RestCut:
    return tuple(channels if axis in axes.get(name, ()) else None for axis in range(len(shape)))


def _final_norms(model: StreamedModel, cut: Cut) -> frozenset[str]:
    """Weights of norms outside the blocks, by the checkpoint's names: what they divide by changes with the channels."""
    axes = _rest_axes(model, cut)
    return frozenset(name for name in axes if len(model.checkpoint.info(name).shape) == 1 and name.endswith(".weight"))


def _rest_stored(norms: frozenset[str], scale: float, value: Tensor, name: str) -> Tensor:
    return (value.float() * scale).to(value.dtype) if name in norms and scale != 1 else value


# ---- proof ---------------------------------------------------------------------------------------------


def prove(model: StreamedModel, staged: Path, record: Mapping[str, Any], *, trust_remote_code: bool = False) -> None:
    """Open what was written as transformers builds it: its parameters are counted, its blocks' calls compared.

    That every tensor has the shape that the config wants is checked by opening it. A block that would be called with
    another mask or other positions than before would compute something else. Raises ArtifactError.
    """
    made = StreamedModel.open(staged, dtype=model.dtype, device=model.device, trust_remote_code=trust_remote_code)
    meant = record["parameters"]["after"]
    found = sum(value.numel() for value in stored_parameters(made.model).values())
    kept = record["kept_blocks"]
    if found != meant or made.num_blocks != len(kept):
        raise ArtifactError(
            f"{staged}: transformers builds a model of {found} parameters in {made.num_blocks} blocks from it, and "
            f"{meant} in {len(kept)} were meant; this family cannot be pruned like this"
        )
    ids = torch.arange(2, 18)[None] % model.vocab_size
    model.embed(ids), made.embed(ids)
    for position, index in enumerate(kept):
        if not same_call(*((c.args, c.kwargs) for c in (model.call(index, ids), made.call(position, ids)))):
            raise ArtifactError(
                f"{staged}: block {position} would be called with other masks or positions than block {index} of the "
                "original, from which it is; this family's blocks cannot be removed"
            )


def same_call(one: Any, other: Any) -> bool:
    """Whether two values that blocks are called with are equal, tensors by content."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(same_call(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same_call(value, other[key]) for key, value in one.items())
    return type(one) is type(other) and (one == other or not isinstance(one, bool | int | float | str))
