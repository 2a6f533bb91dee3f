"""`compress auto`: bits where they count. What is asked for, and the stage that makes what was chosen.

    menu              what each set of linears that share an input may become: INT4 g128, g64, g32, INT8, float16
    sensitivity       what each choice costs the whole model, in KL divergence, measured once
    knapsack, choices the cheapest choices within a budget of bytes; one table for every budget
    auto_stage        a plan from those choices, made by the driver (`compress.stage`) as any AWQ artifact is
    compress.search   which budget: the smallest whose artifact passes the gate, each tried one made and judged

The plan goes through `awq_block` as a uniform one does, a scheme for each group of linears. Where one scheme of 4 bits
suffices the folder is AutoAWQ's, otherwise compressed-tensors' `pack-quantized` with one config group a scheme, whose
targets are exact names: each linear in one, linears that engines fuse in the same (`lint`, before it has a name).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compress import distributed, stage
from compress.block import BlockDone
from compress.checkpoint import Checkpoint
from compress.errors import ConfigError, UnsupportedError
from compress.formats import Format, awq_gemm, compressed_tensors
from compress.model import StreamedModel
from compress.plan import LayerPlan, LayerScheme, outside_blocks
from compress.quantize import awq_stage
from compress.quantize.awq_block import STORE_DTYPE, AwqOptions, awq_block
from compress.quantize.choices import Choice
from compress.quantize.head import READERS, head_of, quantize_head
from compress.quantize.lint import lint
from compress.quantize.menu import Menu
from compress.quantize.stored import stored_config, to_stored
from compress.request import CalibratedRequest
from compress.scheme import Scheme
from compress.stage import Stage

EFFORTS = ("fast", "balanced")


@dataclass(frozen=True, kw_only=True)
class AutoRequest(CalibratedRequest):
    """Everything that decides the artifacts of a search, but their budgets.

    menu: what may be chosen. skip: layers that stay as they are. effort: as of `compress awq`, without `best`, which
    tunes a block in one scheme.
    """

    menu: Menu = Menu()
    skip: tuple[str, ...] = ()
    effort: str = "balanced"
    allow_damage: bool = False

    def __post_init__(self) -> None:
        if self.effort not in EFFORTS:
            raise ConfigError(f"--effort {self.effort}: bits are chosen for {' and '.join(EFFORTS)}; use one of these")

    def options(self) -> dict[str, Any]:
        """What the manifest records."""
        names = ("samples", "seq_len", "seed", "dtype", "effort", "self_samples")
        return {
            **{name: getattr(self, name) for name in names},
            "device": torch.device(self.device).type,
            "skip": list(self.skip),
            "menu": {
                "int4": list(self.menu.int4),
                "symmetric": self.menu.symmetric,
                "int8": self.menu.int8,
                "dense": self.menu.dense,
                "lm_head": self.menu.lm_head,
            },
        }


def base_plan(request: AutoRequest, model: StreamedModel) -> LayerPlan:
    """Which linears are chosen for: all of the blocks but those skipped; the others are dense.

    Says no, in one sentence, to what cannot be done, before any work.
    """
    if distributed.started() > 1:
        raise UnsupportedError(
            f"compress auto measures the model in one process, and {distributed.started()} were started; start it "
            "without torchrun"
        )
    anything = LayerScheme(weight=Scheme(num_bits=8, group_size=-1, symmetric=True))
    plan = awq_stage.plan_blocks(model, anything, skip=request.skip)
    if request.menu.lm_head:
        plan = LayerPlan({**plan.layers, head_of(model): anything}, plan.kv)
    for name, (_, columns) in stage.shapes_of(model, plan).items():
        try:
            request.menu.options(columns)
        except UnsupportedError as e:
            raise UnsupportedError(f"{name}: {e}") from None
    return plan


# ---- the artifact of a choice --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a choice is made from: the request, the choice, and what was measured (for the manifest)."""

    request: AutoRequest
    choice: Choice
    budget: int
    found: Mapping[str, Any] = field(default_factory=dict)


def format_for(plan: LayerPlan, shapes: Mapping[str, tuple[int, int]]) -> Format:
    """AutoAWQ's layout where it can hold the plan, and no output matrix, else compressed-tensors."""
    try:
        awq_gemm.check(plan, shapes)
    except (UnsupportedError, ConfigError):
        return compressed_tensors
    return compressed_tensors if any(outside_blocks(name) for name in plan.quantized) else awq_gemm


def auto_stage(made: Made, shapes: Mapping[str, tuple[int, int]]) -> Stage:
    """The stage that makes one choice. shapes: of the linears that were chosen for."""
    request, choice = made.request, made.choice
    weights = [scheme.weight for scheme in choice.plan.values() if scheme.weight is not None]
    if not weights:
        raise ConfigError(
            f"within {made.budget / 1e6:.2f} MB everything may stay in float16, so there is nothing to make; ask for "
            "fewer bytes, or leave float16 out of the choice with --no-float16"
        )
    options = AwqOptions(scheme=weights[0], effort=request.effort, allow_damage=request.allow_damage)
    return Stage(
        name="auto",
        options={**request.options(), "bytes": made.budget, "chosen": list(choice.labels)},
        format=format_for(choice.plan, {name: shapes[name] for name in choice.plan.quantized}),
        paths=options.paths,
        plan=lambda model: choice.plan,
        block=partial(awq_block, options=options),
        stored=partial(to_stored, dtype=STORE_DTYPE),
        config=partial(stored_config, STORE_DTYPE),
        record=partial(_record, made),
        proof=proof,
        behind=partial(quantize_head, allow_damage=request.allow_damage)
        if any(outside_blocks(name) for name in choice.plan.quantized)
        else None,
    )


def _record(made: Made, done: Sequence[BlockDone], plan: LayerPlan) -> dict[str, Any]:
    """As of `compress awq`, and under `choice` what was measured and predicted."""
    found = made.found
    sets = [
        {"block": one["block"], "layers": list(one["layers"]), "chosen": chosen, "kl": dict(one["kl"])}
        for one, chosen in zip(found["sets"], made.choice.labels, strict=True)
    ]
    measured = {name: value for name, value in found.items() if name != "sets"}
    readers = {"readers": READERS} if any(outside_blocks(name) for name in plan.quantized) else {}
    return {
        **awq_stage.record_of(done, plan),
        **readers,
        "choice": {"predicted_kl": made.choice.kl, "predicted_bytes": made.choice.num_bytes, **measured, "sets": sets},
    }


def proof(model: StreamedModel, staged: Path, record: Mapping[str, Any]) -> None:
    """ArtifactError unless what was written says of every linear exactly what was chosen, as vLLM reads it."""
    lint(
        Checkpoint.open(staged),
        LayerPlan.from_json(record["plan"]),
        [one["layers"] for one in record["choice"]["sets"]],
    )
