"""`compress awq` as a stage: what the user asks for, the plan, and what the driver is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compress import distributed, stage
from compress.block import BlockDone
from compress.calibration_rows import recorded_calib
from compress.errors import UnsupportedError
from compress.formats import Format, awq_gemm, compressed_tensors
from compress.linear import is_conv1d, linears
from compress.model import StreamedModel
from compress.plan import KvScheme, LayerPlan, LayerScheme
from compress.quantize import feedback, refit
from compress.quantize.awq_block import STORE_DTYPE, AwqOptions, awq_block
from compress.quantize.damage import damaged
from compress.quantize.end_to_end_stage import OWN_ROWS, UPDATES, Asked, refine, require_room
from compress.quantize.stored import stored_config, to_stored
from compress.quantize.tune import TuneOptions
from compress.request import CalibratedRequest, recorded_options
from compress.sampling import may_sample_from
from compress.scheme import Scheme
from compress.stage import Outcome, Stage, refuse_quantized
from compress.tell import SILENT, Tell
from compress.workspace import Source

# The fields of a request that a manifest records, beside the scheme, and that a recorded recipe may set again.
_RECORDED = (
    "samples", "seq_len", "seed", "dtype", "device", "skip", "effort", "smooth", "tune_steps", "self_samples",
)  # fmt: skip

# The layout that holds codes of so many bits: AutoAWQ's gemm has room for four.
_FORMAT_OF: dict[int, Format] = {4: awq_gemm, 8: compressed_tensors}


def check_codes(num_bits: int, symmetric: bool | None = None) -> bool:
    """Whether codes of so many bits are to be symmetric: as asked, by default (None) at 8 bits only.

    UnsupportedError for codes that no format here, or no reader of it, takes.
    """
    if num_bits not in _FORMAT_OF:
        raise UnsupportedError(
            f"--bits {num_bits}: `compress awq` makes codes of 4 bits (an AutoAWQ folder) and of 8 (compressed-tensors)"
            "; use `compress awq --bits 4` or `compress awq --bits 8`"
        )
    if num_bits == 8 and symmetric is False:
        raise UnsupportedError(
            "--asym: engines have no kernels for 8-bit weights with zero points; use `compress awq --bits 8 --sym`"
        )
    return num_bits == 8 if symmetric is None else symmetric


@dataclass(frozen=True, kw_only=True)
class AwqRequest(CalibratedRequest):
    """Everything that decides the artifact. seed: also of tuning. self_samples: None leaves it to the effort.

    end_to_end: updates of codes, scales and norms through the whole model once its blocks are done; None leaves it to
    the effort and the device (`updates`). allow_damage: see `AwqOptions`; it decides no byte of a model that is not
    damaged, so a run may go on with it.
    """

    scheme: Scheme
    skip: tuple[str, ...] = ()
    effort: str = "balanced"
    smooth: bool = True
    tune_steps: int = 200
    end_to_end: int | None = None
    allow_damage: bool = False

    @property
    def tops_up(self) -> bool:
        """Effort `best` learns from the rows, and what learns from little text fits that text."""
        return self.effort == "best"

    @property
    def updates(self) -> int:
        """Of the step through the whole model: as asked, else those of `best` at 4 bits, in one process on a GPU, for
        a model small enough to be sampled from; a CPU has no time for them."""
        if self.end_to_end is not None:
            return self.end_to_end
        takes = self.effort == "best" and self.scheme.num_bits == 4 and torch.device(self.device).type != "cpu"
        return UPDATES if takes and not distributed.running() and self._may_sample else 0

    @property
    def own_rows(self) -> int:
        """Rows of the model's own that the step adds to those of the blocks; none where the user gives a number."""
        on_gpu = torch.device(self.device).type != "cpu"
        return OWN_ROWS if self.tops_up and self.self_samples is None and on_gpu and self._may_sample else 0

    @property
    def _may_sample(self) -> bool:
        return may_sample_from(self.source.path, self.device) is None

    def options(self) -> dict[str, Any]:
        """What the manifest and the resumed run's check record."""
        return {
            "scheme": self.scheme.to_json(),
            **{name: getattr(self, name) for name in _RECORDED},
            "device": torch.device(self.device).type,
            "skip": list(self.skip),
            **({"end_to_end": self.updates} if self.updates else {}),
        }


def quantize_awq(request: AwqRequest, tell: Tell = SILENT) -> Outcome:
    """Quantize `request.source` to a folder at `request.out`, AutoAWQ gemm at 4 bits, compressed-tensors at 8."""
    return stage.run(awq_stage(request), request.job(), tell)


def awq_stage(request: AwqRequest) -> Stage:
    """The stage that a request asks for."""
    check_codes(request.scheme.num_bits, request.scheme.symmetric)
    options = AwqOptions(
        scheme=request.scheme,
        effort=request.effort,
        smooth=request.smooth,
        allow_damage=request.allow_damage,
        tune=TuneOptions(steps=request.tune_steps, seed=request.seed),
    )
    asked = asked_of(request)
    return Stage(
        name="awq",
        options=request.options(),
        format=_FORMAT_OF[request.scheme.num_bits],
        paths=options.paths,
        plan=partial(plan_of, request),
        block=partial(awq_block, options=options),
        stored=partial(to_stored, dtype=STORE_DTYPE),
        config=partial(stored_config, STORE_DTYPE),
        refine=partial(refine, asked) if asked.updates else None,
        record=record_of,
        warm=partial(_warm, request.scheme),
    )


def _warm(scheme: Scheme, device: torch.device) -> None:
    feedback.warm(scheme, device)
    refit.warm(scheme, device)


def asked_of(request: AwqRequest) -> Asked:
    """What a request asks of learning through the whole model."""
    return Asked(
        updates=request.updates,
        seed=request.seed,
        group_size=request.scheme.group_size,
        own_rows=request.own_rows,
    )


def plan_of(request: AwqRequest, model: StreamedModel) -> LayerPlan:
    """Every linear of the blocks in the request's scheme but those skipped; the others stay dense.

    Says no, in one sentence, to what the method cannot do, before any work is done.
    """
    if request.effort == "best" and distributed.running():
        raise UnsupportedError(
            f"--effort best tunes each block on all rows in one process, and {distributed.num_processes()} were "
            "started; start one, or use --effort balanced"
        )
    if request.end_to_end:  # said before any work, not after all of it
        rows = request.samples + (request.self_samples or request.samples)
        require_room(asked_of(request), request.job(), model, rows=rows, seq_len=request.seq_len)
    return plan_blocks(model, LayerScheme(weight=request.scheme), skip=request.skip)


def plan_blocks(
    model: StreamedModel, scheme: LayerScheme, *, skip: Sequence[str] = (), kv: KvScheme | None = None
) -> LayerPlan:
    """Every linear of the blocks in `scheme` but those skipped; the others stay dense.

    UnsupportedError for a model that is quantized already, and for layers that readers would not find.
    """
    refuse_quantized(model)
    outside, inside = stage.names_of(model)
    blocks = LayerPlan.uniform(inside, scheme, skip=skip)
    plan = LayerPlan({**LayerPlan.dense(outside), **blocks}, kv)
    for i, block in enumerate(model.blocks):
        for name, module in linears(block).items():
            full = model.block_prefix(i) + name
            if is_conv1d(module) and not plan[full].is_dense:
                raise UnsupportedError(
                    f"{full} is a transformers Conv1D (GPT-2's transposed linear), which readers of quantized folders "
                    "leave as it is, so they could not load the folder; use a model built of nn.Linear"
                )
    return plan


def record_of(done: Sequence[BlockDone], plan: LayerPlan) -> dict[str, Any]:
    """Errors of all layers, what was found of all groups, what tuning gained, and what was left in float16."""
    layers = [layer for step in done for layer in step.report["layers"]]
    return {
        "layers": layers,
        "damaged": damaged(layers),
        "groups": [{"block": step.index, **group} for step in done for group in step.report["groups"]],
        "tuning": [{"block": step.index, **step.report["tuning"]} for step in done if "tuning" in step.report],
        "left_in_float16": list(plan.left_dense),
    }


def request_from_record(
    record: Mapping[str, Any], folder: Path, *, source: Source, out: Path, scheme: Scheme
) -> AwqRequest:
    """The request that made the artifact in `folder`, as its manifest's `record` tells it, with another scheme.

    `source` is its parent. Raises ArtifactError when the record holds an option that this version does not know, or
    when the calibration text is gone.
    """
    options = recorded_options(record, folder, "awq", {*_RECORDED, "scheme", "end_to_end", "clip"})
    del options["scheme"]
    options.setdefault("end_to_end", 0)  # a manifest that says nothing of it was made without
    options.pop("clip", None)  # true in artifacts of 2026: ranges were not fitted only where a test asked for it
    calib = recorded_calib(record, folder)
    allowed = bool(record.get("damaged"))  # who asked for that once asks for the same recipe again
    return AwqRequest(source=source, out=out, scheme=scheme, calib=calib, allow_damage=allowed, **options)
