"""From what the user asks for to what is made: which blocks stay, which widths, and for a goal which shape of many.

Everything here runs the model and stores nothing but facts, each measured once a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from compress.blocks import batch_rows
from compress.errors import ConfigError, UnsupportedError
from compress.journal import Facts
from compress.model import StreamedModel
from compress.prune.channels import Channels, measure_channels
from compress.prune.cut import Cut, needs_structure, plan_cut
from compress.prune.depth import Depth, measure_depth
from compress.prune.judge import Sample, judge
from compress.prune.kinds import Kinds
from compress.prune.prune_block import PruneOptions
from compress.prune.search import Costs, Tried, choices, grid, probes, sized
from compress.prune.shape import Counter, Shape, asked_shape, head_dim_of, shape_of
from compress.prune.structure import Structure, find_structure
from compress.tell import Tell

# Tokens that blocks are bypassed on; rows that shapes are fitted to, and of each kind of text judged on.
DEPTH_TOKENS = 8192
SEARCH_ROWS = 40
HELD_ROWS = 8
_PROBE = torch.arange(16)[None] * 37


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What goes, as the user wrote it (`4` or `0.25`), or a goal: parameters, bytes, a machine, a divergence.

    fits(config): whether a model of that config.json fits the machine called `target`. candidates: shapes that are
    judged as a whole.
    """

    depth: str | None = None
    intermediate: str | None = None
    heads: str | None = None
    kv_heads: str | None = None
    hidden: str | None = None
    params: int | None = None
    bytes: int | None = None
    target: str | None = None
    fits: Callable[[Mapping[str, Any]], bool] | None = None
    max_kl: float | None = None
    candidates: int = 10

    @property
    def amounts(self) -> dict[str, str | None]:
        """The shares and counts, by option."""
        names = ("depth", "intermediate", "heads", "kv_heads", "hidden")
        return {name: getattr(self, name) for name in names}

    @property
    def has_goal(self) -> bool:
        return any(value is not None for value in (self.params, self.bytes, self.target, self.max_kl))

    def to_json(self) -> dict[str, Any]:
        """As the manifest records it."""
        goal = {"params": self.params, "bytes": self.bytes, "target": self.target, "max_kl": self.max_kl}
        return {**self.amounts, **goal, "candidates": self.candidates if self.has_goal else None}

    def check(self, model: StreamedModel) -> None:
        """Raise ConfigError or UnsupportedError, before any work, for what cannot be made of the model."""
        explicit = any(value is not None for value in self.amounts.values())
        if explicit == self.has_goal:
            what = "both amounts and a goal" if explicit else "neither an amount nor a goal"
            raise ConfigError(
                f"{what} to prune by; pass --depth, --intermediate, --heads or --hidden, or else one of --params, "
                "--bytes, --target and --max-kl"
            )
        old = shape_of(model)
        if explicit:
            shape = self.shape(model)
            Counter(model).check(shape)
            structure = find_whole_structure(model) if needs_structure(old, shape) else None
            kept = range(shape.blocks)
            plan_cut(model, shape, kept, structure, _first_channels(old, shape))
        else:
            self.check_goal(model)

    def shape(self, model: StreamedModel) -> Shape:
        """The shape that the amounts leave. ConfigError when they remove nothing."""
        old = shape_of(model)
        shape = asked_shape(old, **self.amounts)
        if shape == old:
            raise ConfigError("nothing would go; ask for more with --depth, --intermediate, --heads or --hidden")
        return shape

    def check_goal(self, model: StreamedModel) -> None:
        """ConfigError when no shape that is tried meets the goal (the smallest is named), or the model does already."""
        old = shape_of(model)
        meets = self.meets(model)
        if (self.params or self.bytes or self.target) and meets(old):
            raise ConfigError(f"{model.checkpoint.path} meets {self.goal_text()} as it is; nothing need go")
        allowed = allowed_choices(model)
        counter = Counter(model)
        small = replace(old, blocks=allowed["blocks"][-1].blocks, intermediate=allowed["intermediate"][-1].intermediate)
        both = [
            replace(small, heads=h.heads, kv_heads=h.kv_heads, hidden=w.hidden)
            for h in allowed["heads"]
            for w in allowed["hidden"]
        ]
        nearest = min((shape for shape in both if counter.builds(shape)), key=counter.parameters)
        if not meets(nearest):
            numbers = counter.parameters(nearest)
            weights = -(-numbers * bytes_per_number(model) // 1)
            ask = self.params and f"--params {numbers}" or self.bytes and f"--bytes {weights:.0f}"
            raise ConfigError(
                f"no shape meets {self.goal_text()}: the smallest that is tried, {nearest.label()}, has "
                f"{numbers / 1e6:.3g} M parameters in {weights / 1e6:.3g} MB; "
                f"{f'ask for {ask}, or quantize' if ask else 'quantize it'} as well"
            )

    def meets(self, model: StreamedModel) -> Callable[[Shape], bool]:
        """Whether a shape is small enough."""
        counter = Counter(model)
        width = bytes_per_number(model)

        def small(shape: Shape) -> bool:
            if not counter.builds(shape):
                return False
            numbers = counter.parameters(shape)
            if self.params is not None and numbers > self.params:
                return False
            if self.bytes is not None and numbers * width > self.bytes:
                return False
            return self.fits is None or self.fits(counter.config(shape))

        return small

    def goal_text(self) -> str:
        """The goal as the user would write it."""
        parts = {
            "--params": self.params and sized(self.params),
            "--bytes": self.bytes and sized(self.bytes),
            "--target": self.target,
            "--max-kl": self.max_kl and f"{self.max_kl:g}",
        }
        return " ".join(f"{option} {value}" for option, value in parts.items() if value)


def bytes_per_number(model: StreamedModel) -> float:
    """Bytes of weights over numbers in them, as the folder stores them."""
    infos = model.checkpoint.tensors.values()
    return sum(info.num_bytes for info in infos) / max(1, sum(info.numel for info in infos))


def _first_channels(old: Shape, shape: Shape) -> Tensor | None:
    return torch.arange(shape.hidden) if shape.hidden < old.hidden else None


def find_whole_structure(model: StreamedModel) -> Structure:
    """The structure of the model's blocks, found in the first. UnsupportedError when they are not alike."""
    found = _known.get(model)
    if found is None:
        found = _known[model] = _find_whole_structure(model)
    return found


_known: WeakKeyDictionary[StreamedModel, Structure] = WeakKeyDictionary()


@torch.no_grad()
def _find_whole_structure(model: StreamedModel) -> Structure:
    shapes = [{name: tuple(p.shape) for name, p in block.named_parameters()} for block in model.blocks]
    other = next((i for i, found in enumerate(shapes) if found != shapes[0]), None)
    if other is not None:
        raise UnsupportedError(
            f"{model.checkpoint.path}: block {other} has other tensors than block 0, so no width fits all; "
            "use --depth --no-repair"
        )
    hidden = model.embed(_PROBE % model.vocab_size)
    block = model.load_block(0, torch.float32)
    try:
        return find_structure(block, partial(model.run_exact, 0, hidden), head_dim_of(model))
    finally:
        model.release_block(0)


def allowed_choices(model: StreamedModel) -> dict[str, list[Shape]]:
    """What a search may choose from, by axis: a cut that this family does not take is left out."""
    old, counter = shape_of(model), Counter(model)
    structure = find_whole_structure(model)
    out: dict[str, list[Shape]] = {}
    for axis, shapes in choices(old).items():
        out[axis] = shapes[:1]
        for shape in shapes[1:]:
            try:
                counter.check(shape)
                plan_cut(model, replace(shape, blocks=1), [0], structure, _first_channels(old, shape))
            except UnsupportedError:
                continue
            out[axis].append(shape)
    return out


# ---- deciding ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """A model with what was measured of it, and how a shape of it is cut and judged."""

    model: StreamedModel
    sample: Sample | None
    options: PruneOptions
    facts: Facts
    tell: Tell
    structure: Structure | None
    depth: Depth | None
    channels: Channels | None

    def cut(self, shape: Shape) -> Cut:
        """How the model gets to `shape`."""
        old = shape_of(self.model)
        gone = old.blocks - shape.blocks
        kept = self.depth.kept(gone) if self.depth is not None else list(range(old.blocks))
        channels, scale = None, 1.0
        if shape.hidden < old.hidden:
            assert self.channels is not None
            channels, scale = self.channels.kept(shape.hidden), self.channels.scale[shape.hidden]
        cut = plan_cut(self.model, shape, kept, self.structure, channels)
        return replace(cut, final_scale=scale)

    def judged(self, shape: Shape) -> Mapping[str, Any]:
        """Divergence of the shape on rows held out, by kind of text and their mean; see `judge.final_divergence`."""
        self.tell.step(doing=f"judging {shape.label()}")

        def find() -> dict[str, Any]:
            assert self.sample is not None
            return judge(self.model, self.sample, self.cut(shape), self.options, self.tell)

        found: Mapping[str, Any] = self.facts.once(f"judged {shape.label()}", find)
        return found


def decide(
    asked: Asked,
    model: StreamedModel,
    ids_NT: Tensor,
    kinds: Kinds,
    options: PruneOptions,
    facts: Facts,
    tell: Tell,
) -> dict[str, Any]:
    """What is made, as JSON: shape, kept blocks and channels, and what was measured on the way.

    kinds: which rows of `ids_NT` (int64 `[N, T]`) are fitted on, and which judge.
    """
    old = shape_of(model)
    batch = batch_rows(model, ids_NT.shape[1])
    shape = None if asked.has_goal else asked.shape(model)
    allowed = allowed_choices(model) if shape is None else {}
    fewest = shape.blocks if shape is not None else min(s.blocks for s in allowed["blocks"])
    narrow = [shape.hidden] if shape is not None else [s.hidden for s in allowed["hidden"]]
    narrow = [hidden for hidden in narrow if hidden < old.hidden]
    few = ids_NT[kinds.first(DEPTH_TOKENS // ids_NT.shape[1])]
    depth = channels = None
    if fewest < old.blocks:
        tell.start("step", old.blocks - fewest + 1)
        found = facts.once(
            "depth", lambda: measure_depth(model, few, old.blocks - fewest, batch=batch, tell=tell).to_json()
        )
        depth = Depth.from_json(found)
    if narrow:
        channels = Channels.from_json(
            facts.once("channels", lambda: measure_channels(model, few, narrow, batch).to_json())
        )
    wants = shape is None or options.repair or needs_structure(old, shape)
    measured = _Measured(
        model=model,
        sample=search_sample(ids_NT, kinds) if shape is None else None,
        options=options,
        facts=facts,
        tell=tell,
        structure=find_whole_structure(model) if wants else None,
        depth=depth,
        channels=channels,
    )
    searched = None
    if shape is None:
        shape, searched = _searched(asked, measured, allowed)
    cut = measured.cut(shape)
    return {
        "shape": shape.to_json(),
        "kept": list(cut.kept),
        "channels": None if cut.channels is None else cut.channels.tolist(),
        "final_scale": cut.final_scale,
        "depth": None if depth is None else depth.to_json(),
        "search": searched,
        "kinds": kinds.to_json(),
    }


def search_sample(ids_NT: Tensor, kinds: Kinds) -> Sample:
    """Rows for judging many shapes: some of those that are fitted on, and of those held out."""
    if not kinds.held:
        raise ConfigError(
            f"{len(ids_NT)} calibration row leaves none to judge on; give more text, or shorter rows with --seq-len"
        )
    chosen, few = kinds.some(SEARCH_ROWS, HELD_ROWS)
    return Sample(ids_NT=ids_NT[chosen], kinds=few)


def _searched(
    asked: Asked, measured: _Measured, allowed: Mapping[str, Sequence[Shape]]
) -> tuple[Shape, dict[str, Any]]:
    """The shape that meets the goal at least divergence, and what was tried."""
    model = measured.model
    old = shape_of(model)
    counter = Counter(model)
    costs = _single_costs(measured, allowed)
    shapes = candidates_of(asked, model, allowed)
    if asked.max_kl is not None and not (asked.params or asked.bytes or asked.target):
        wanted = asked.max_kl
        near = [s for s in shapes if costs.predicted(s) <= 1.5 * wanted] or shapes
        shapes = sorted(near, key=lambda s: (counter.parameters(s), s.label()))
    else:
        shapes = sorted(shapes, key=lambda s: (costs.predicted(s), s.label()))
    tried: list[Tried] = []
    measured.tell.start("shape", min(asked.candidates, len(shapes)))
    for shape in shapes[: asked.candidates]:
        found = measured.judged(shape)
        tried.append(
            Tried(
                shape=shape,
                parameters=counter.parameters(shape),
                predicted=costs.predicted(shape),
                divergence=found["held_out"],
                by_text=found["by_text"],
            )
        )
        measured.tell.step(len(tried), doing=f"{shape.label()}: KL {tried[-1].divergence:.3f}")
    best = _chosen(asked, tried)
    single = [
        [axis, share, kl] for axis, points in costs.points.items() for share, kl in sorted(points.items()) if share
    ]
    heads = [[h, k, kl] for (h, k), kl in sorted(costs.heads.items()) if (h, k) != (old.heads, old.kv_heads)]
    return best.shape, {
        "goal": asked.goal_text(),
        "grid": len(shapes),
        "single_cuts": single,
        "heads": heads,
        "tried": [one.to_json() for one in tried],
    }


def candidates_of(asked: Asked, model: StreamedModel, allowed: Mapping[str, Sequence[Shape]]) -> list[Shape]:
    """The shapes that meet a goal, of which the most promising are judged."""
    meets = asked.meets(model)
    if asked.params or asked.bytes or asked.target:
        return grid(shape_of(model), meets, allowed)
    every = [grid(shape_of(model), meets, {**allowed, "intermediate": [w]}) for w in allowed["intermediate"]]
    return [shape for shapes in every for shape in shapes]


def _chosen(asked: Asked, tried: Sequence[Tried]) -> Tried:
    if asked.max_kl is None or asked.params or asked.bytes or asked.target:
        return min(tried, key=lambda one: (one.divergence, one.parameters))
    good = [one for one in tried if one.divergence <= asked.max_kl]
    if not good:
        nearest = min(tried, key=lambda one: one.divergence)
        raise ConfigError(
            f"no shape of {len(tried)} judged stays within --max-kl {asked.max_kl:g}: the nearest is "
            f"{nearest.shape.label()} at {nearest.divergence:.3f}; allow that, or raise --candidates"
        )
    return min(good, key=lambda one: (one.parameters, one.divergence))


def _single_costs(measured: _Measured, allowed: Mapping[str, Sequence[Shape]]) -> Costs:
    """Cuts of one axis alone, measured; the blocks' own curve gives the form between its point and others."""
    old = shape_of(measured.model)
    costs = Costs(old)
    wanted = probes(old, allowed)
    measured.tell.start("single cut", len(wanted))
    for done, (axis, shape) in enumerate(wanted, 1):
        divergence = float(measured.judged(shape)["held_out"])
        costs.add(axis, shape, divergence)
        if axis == "blocks" and measured.depth is not None:
            unrepaired = measured.depth.divergence(old.blocks - shape.blocks)
            for other in allowed["blocks"]:
                gone = old.blocks - other.blocks
                if gone and unrepaired > 0:
                    costs.add("blocks", other, measured.depth.divergence(gone) * divergence / unrepaired)
        measured.tell.step(done, doing=f"{shape.label()}: KL {divergence:.3f}")
    return costs
