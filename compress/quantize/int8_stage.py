"""`compress int8` as a stage: what the user asks for, the plan, and what the driver is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compress import distributed, stage
from compress.block import BlockDone
from compress.calibration_rows import Rows, recorded_calib
from compress.checkpoint import Checkpoint
from compress.errors import ConfigError, UnsupportedError
from compress.formats import compressed_tensors
from compress.journal import Facts
from compress.model import StreamedModel
from compress.plan import ActivationScheme, KvScheme, LayerPlan, LayerScheme
from compress.quantize import keep_inputs
from compress.quantize.awq_stage import plan_blocks
from compress.quantize.damage import damaged
from compress.quantize.int8_block import Int8Options, int8_block
from compress.quantize.stored import stored_config, to_stored
from compress.request import CalibratedRequest, recorded_options
from compress.scheme import Scheme
from compress.stage import Outcome, Stage
from compress.tell import SILENT, Tell
from compress.workspace import Source

SCHEMES = ("w8a8", "w8a16")

# The fields of a request that a manifest records, and that a recorded recipe may set again.
_RECORDED = (
    "samples", "seq_len", "seed", "dtype", "device", "skip", "effort", "scheme", "group_size", "static",
    "sym_activations", "keep_inputs", "kv_cache", "smoothing", "self_samples",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Int8Request(CalibratedRequest):
    """Everything that decides the artifact.

    scheme: `w8a8`, weights and inputs as integers, or `w8a16`, weights only. group_size: input channels that share a
    scale, -1 for one scale a row, which is all that readers take of w8a8. static: inputs with one calibrated range a
    layer instead of one a token. sym_activations: without zero points; None: with them by token, without where static
    (METHODS.md). keep_inputs: how many groups of layers keep their inputs as floats, those that lose most by rounding
    them; None: those that lose several times what is usual (`keep_inputs`). kv_cache: `int8` or None. smoothing: a
    strength of SmoothQuant's formula for every group, 0 for none, None to search. effort: see `int8_block`; `auto` is
    what the scheme gains by (METHODS.md). allow_damage: see `Int8Options`; it decides no byte of a model that is not
    damaged.
    """

    scheme: str = "w8a8"
    group_size: int = -1
    static: bool = False
    sym_activations: bool | None = None
    keep_inputs: int | None = 0
    kv_cache: str | None = None
    smoothing: float | None = None
    skip: tuple[str, ...] = ()
    effort: str = "auto"
    allow_damage: bool = False

    def __post_init__(self) -> None:
        if self.effort == "auto":
            object.__setattr__(self, "effort", "fast" if self.scheme == "w8a8" else "balanced")
        asked_for_zero_points = self.sym_activations is False
        if self.sym_activations is None:
            object.__setattr__(self, "sym_activations", self.static or self.scheme != "w8a8")
        if self.scheme not in SCHEMES:
            raise ConfigError(f"--scheme {self.scheme} is not one of {', '.join(SCHEMES)}; choose one of these")
        if self.scheme == "w8a8" and self.group_size != -1:
            raise ConfigError(
                f"--scheme w8a8 has one scale a row, and --group-size {self.group_size} asks for more; use --scheme "
                "w8a16, or leave --group-size out"
            )
        if self.scheme == "w8a16" and (self.static or asked_for_zero_points):
            asked = "--static" if self.static else "--asym-activations"
            raise ConfigError(f"{asked} is about inputs, which --scheme w8a16 does not quantize; use --scheme w8a8")
        if self.scheme == "w8a16" and self.keep_inputs != 0:
            raise ConfigError("--keep-inputs is what --scheme w8a16 does of every layer; leave it out")
        if self.kv_cache not in (None, "int8"):
            raise ConfigError(f"--kv-cache {self.kv_cache} is not computed; choose int8, or leave it out")

    def layer_scheme(self) -> LayerScheme:
        """What every layer becomes."""
        weight = Scheme(num_bits=8, group_size=self.group_size, symmetric=True)
        if self.scheme == "w8a16":
            return LayerScheme(weight=weight)
        return LayerScheme(
            weight=weight, input=ActivationScheme(symmetric=bool(self.sym_activations), dynamic=not self.static)
        )

    def kv(self) -> KvScheme | None:
        """How the cache is to be held."""
        return KvScheme() if self.kv_cache == "int8" else None

    def label(self) -> str:
        """Short name as used in file names: `w8a8`, `w8a8-sym`, `w8a8-static`, `w8a16g128`, `w8a8-keep3-kv8`."""
        parts = [self.scheme + (f"g{self.group_size}" if self.group_size != -1 else "")]
        parts += ["static"] if self.static else []
        if self.scheme == "w8a8" and self.sym_activations != self.static:
            parts += ["sym" if self.sym_activations else "asym"]
        parts += [] if self.keep_inputs == 0 else [f"keep{'auto' if self.keep_inputs is None else self.keep_inputs}"]
        parts += ["kv8"] if self.kv_cache else []
        return "-".join(parts)

    def options(self) -> dict[str, Any]:
        """What the manifest and the resumed run's check record."""
        return {
            **{name: getattr(self, name) for name in _RECORDED},
            "device": torch.device(self.device).type,
            "skip": list(self.skip),
        }


def quantize_int8(request: Int8Request, tell: Tell = SILENT) -> Outcome:
    """Quantize `request.source` to a compressed-tensors folder at `request.out`; see `stage.run`."""
    return stage.run(int8_stage(request), request.job(), tell)


def int8_stage(request: Int8Request) -> Stage:
    """The stage that a request asks for."""
    options = Int8Options(
        effort=request.effort,
        strength=request.smoothing,
        allow_damage=request.allow_damage,
        dtype=stored_dtype(Checkpoint.open(request.source.path)),
    )
    made = Stage(
        name="int8",
        options=request.options(),
        format=compressed_tensors,
        paths=options.paths,
        wants=options.wanted,
        plan=partial(plan_of, request),
        block=partial(int8_block, options=options),
        stored=partial(to_stored, dtype=options.dtype),
        config=partial(stored_config, options.dtype),
        record=record_of,
    )
    if request.keep_inputs == 0:
        return made
    measured = replace(options, effort="fast", allow_damage=True)
    return replace(made, measure=partial(_measure, request, measured), decided=partial(_decided, made, request))


def plan_of(request: Int8Request, model: StreamedModel) -> LayerPlan:
    """Every linear of the blocks in the request's scheme but those skipped; the others stay dense."""
    if request.keep_inputs != 0 and distributed.running():
        raise UnsupportedError(
            f"--keep-inputs measures the model in one process, and {distributed.num_processes()} were started; start "
            "it without torchrun"
        )
    return plan_blocks(model, request.layer_scheme(), skip=request.skip, kv=request.kv())


def _measure(
    request: Int8Request, options: Int8Options, model: StreamedModel, rows: Rows, facts: Facts, tell: Tell
) -> Mapping[str, Any]:
    """What rounding the inputs of each group of layers loses; measured once a run."""
    plan = plan_of(request, model)
    block = partial(int8_block, plan=plan, options=options)
    groups = facts.once(
        "keep_inputs", lambda: keep_inputs.measure(model, rows.ids_NT, block, plan, options.wanted, tell)
    )
    return {"groups": groups}


def _decided(made: Stage, request: Int8Request, model: StreamedModel, found: Mapping[str, Any]) -> Stage:
    """The stage once it is known whose inputs stay floats."""
    groups = keep_inputs.chosen(found["groups"], request.keep_inputs)
    plan = keep_inputs.kept(plan_of(request, model), groups)
    said = {"measured": len(found["groups"]), "groups": groups}
    return replace(made, plan=lambda _: plan, record=lambda done, plan: {**record_of(done, plan), "kept_inputs": said})


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What scales and everything that is not quantized are stored in: the model's own 16-bit floats, else float16."""
    largest = max(checkpoint.tensors.values(), key=lambda info: info.num_bytes)
    return torch.bfloat16 if largest.dtype == "BF16" else torch.float16


def record_of(done: Sequence[BlockDone], plan: LayerPlan) -> dict[str, Any]:
    """Errors of all layers, what was found of all groups, what an INT8 cache costs, and what was left as it is."""
    record: dict[str, Any] = {
        "layers": [layer for step in done for layer in step.report["layers"]],
        "groups": [{"block": step.index, **group} for step in done for group in step.report["groups"]],
        "damaged": damaged(layer for step in done for layer in step.report["layers"]),
        "left_dense": list(plan.left_dense),
    }
    if plan.kv is not None:
        record["kv_cache"] = [{"block": step.index, **step.report["kv_cache"]} for step in done]
    return record


def request_from_record(
    record: Mapping[str, Any], folder: Path, *, source: Source, out: Path, **changed: Any
) -> Int8Request:
    """The request that made the artifact in `folder`, as its manifest's `record` tells it, with fields `changed`.

    `source` is its parent. Raises ArtifactError when the record holds an option that this version does not know, or
    when the calibration text is gone.
    """
    options = recorded_options(record, folder, "int8", _RECORDED)
    calib = recorded_calib(record, folder)
    return Int8Request(source=source, out=out, calib=calib, **{**options, **changed})
