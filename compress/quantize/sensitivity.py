"""What each choice for each set of linears would cost the whole model, in KL divergence, without a gradient.

Four measurements, in one pass over the model, a block in memory at a time:

1. Of every set of linears that share an input (q, k, v; o; gate, up; down) and every option of the menu: the
   output error `tr(D H D^T)` after error feedback and refitted scales, on the Gram matrix H of calibration rows and a
   sample of the weight's rows. It tells options of one set from each other.
2. Of every set of some blocks (all, where they are few), rounded whole in the option in the middle (the *probe*), the
   rest of the model as it was: the true KL divergence of the next token, on a few rows that H has not seen. It tells
   the sets of a block from each other: what an error does behind q is not what it does behind `down`.
3. Of every set, so rounded: how far the block's output moves. It carries what was found of the sets of probed blocks
   to those between. By itself it misleads: a block's output is mostly a few channels and tokens of large values.
4. Of every block that is probed, rounded whole: the true KL divergence on more rows. It tells blocks from each other.
   All of these models walk through the blocks side by side, each branching off where it differs, as in `prune.depth`.
   One more has all blocks rounded: what its divergence is over the sum of the single ones corrects all figures for
   what errors do to each other.

The output matrix, if it is chosen for, is a set of its own: rounded whole in its probe, its divergence is measured.

So `kl[set][option] = KL(block) * share of the set among its block's * error(option) / error(probe) * correction`.
Divergences add up while they are small, and a choice is judged as a whole afterwards, never by this sum alone.

Shapes: N rows, T tokens, H hidden size, O out_features, I in_features
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from compress.block import BlockResult, LoadedBlock
from compress.blocks import batch_rows, stream
from compress.divergence import divergences, head_divergence
from compress.errors import ConfigError
from compress.groups import Group
from compress.linear import is_conv1d, weight_OI
from compress.model import StreamedModel
from compress.plan import DENSE, LayerPlan, LayerScheme
from compress.quantize import awq, head
from compress.quantize.feedback import Prepared, prepare
from compress.quantize.menu import Menu, label
from compress.scheme import Scheme
from compress.statistics import InputStatistics, kept_share
from compress.tell import Tell

# Rows that Gram matrices are summed over, and tokens that divergences are measured on.
GRAM_ROWS = 64
PROBE_TOKENS = 4096
# Tokens that the divergences of single sets are measured on: there are several times as many as blocks.
SET_TOKENS = 1024
# Rows of a weight whose error stands for all of them.
SAMPLED_ROWS = 256
# Blocks that are probed one by one; of more, as many at even distances, and what lies between is interpolated.
MOST_PROBES = 16
_LEAST_ROWS = 4


@dataclass(kw_only=True)
class _Set:
    """Linears of one input. errors: by option, over that of the probe. moved: how far its probe moves the block; of
    what lies behind the blocks, the divergence itself."""

    block: int
    layers: list[str]
    errors: dict[str, float]
    moved: float
    behind: bool = False

    @property
    def place(self) -> str:
        """Where in its block it lies, the same in every block: its layers' names after the block's number."""
        return ", ".join(name.partition(f".{self.block}.")[2] for name in self.layers)


@dataclass(kw_only=True)
class _Found:
    """What is known so far. moved: how far each block's output moves, all its sets rounded, over its own square."""

    moved: dict[int, float] = field(default_factory=dict)
    sets: list[_Set] = field(default_factory=list)


@dataclass(kw_only=True)
class _Paths:
    """Hidden states of the rows that divergences are measured on: of the original, of each block's probe, with all
    rounded, and, of the first few rows, of each set's probe by block and place."""

    original: list[Tensor]
    rounded: list[Tensor]
    probes: dict[int, list[Tensor]] = field(default_factory=dict)
    sets: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def few(self, hidden: Tensor) -> Tensor:
        """The rows of the first batch that single sets are measured on."""
        return hidden[: max(1, SET_TOKENS // hidden.shape[1])]


def measure(model: StreamedModel, ids_NT: Tensor, plan: LayerPlan, menu: Menu, tell: Tell) -> dict[str, Any]:
    """JSON: under `sets`, in the model's order, of each set its `layers` by their full names and by option its `kl`.

    plan: what is not dense in it is chosen for. ids_NT: calibration rows, of which the last ones are held out for the
    divergences. ConfigError for fewer rows than that needs.
    """
    held = min(max(1, PROBE_TOKENS // ids_NT.shape[1]), len(ids_NT) // 2)
    if len(ids_NT) < _LEAST_ROWS:
        raise ConfigError(
            f"{len(ids_NT)} calibration rows are too few to measure what can be spared, {_LEAST_ROWS} are needed; pass "
            "more text, or a smaller --seq-len"
        )
    rows_NT = ids_NT[: len(ids_NT) - held][:GRAM_ROWS]
    entering = model.embed_batches(ids_NT[len(ids_NT) - held :].split(batch_rows(model, ids_NT.shape[1])))
    paths = _Paths(original=entering, rounded=list(entering))
    probed = probed_blocks(model.num_blocks)
    found = _Found()

    def method(loaded: LoadedBlock) -> BlockResult:
        _block(model, loaded, plan, menu, paths, found, probe=loaded.index in probed)
        return BlockResult(quantized={}, dense={})

    def behind(hidden: list[Tensor]) -> None:
        found.sets.append(_head(model, hidden, paths.original, menu))

    heads = menu.lm_head and not plan.get(model.own_head() or "", DENSE).is_dense
    tell.start("measuring block", model.num_blocks + heads)
    for step in stream(model, rows_NT, method, behind=behind if heads else None, tell=tell):
        tell.step(step.index + 1)
    tell.say("comparing what the rounded models predict")
    kl = divergences(model, paths.original, [paths.rounded, *paths.probes.values()])
    few = divergences(model, [paths.few(paths.original[0])], [[hidden] for hidden in paths.sets.values()])
    shares = shares_of(found.sets, dict(zip(paths.sets, few, strict=True)))
    blocks = interpolated(dict(zip(paths.probes, kl[1:], strict=True)), found.moved)
    total = sum(blocks.values())
    correction = kl[0] / total if total > 0 else 1.0
    return {
        "gram_tokens": rows_NT.numel(),
        "probe_tokens": held * ids_NT.shape[1],
        "set_tokens": paths.few(paths.original[0]).shape[0] * ids_NT.shape[1],
        "probes": {str(block): _digits(value) for block, value in zip(paths.probes, kl[1:], strict=True)},
        "all_rounded": _digits(kl[0]),
        "correction": _digits(correction),
        "sets": [
            _priced(one, one.moved if one.behind else blocks[one.block] * share * correction)
            for one, share in zip(found.sets, shares, strict=True)
        ],
    }


def _priced(one: _Set, probe: float) -> dict[str, Any]:
    """A set as it is reported: what its probe costs, by option."""
    kl = {name: _digits(probe * error) for name, error in monotone(one.errors).items()}
    return {"block": one.block, "layers": one.layers, "kl": kl}


def shares_of(sets: Sequence[_Set], known: Mapping[tuple[int, str], float]) -> list[float]:
    """Of each set its part in what its block costs.

    known: divergences of single sets, by block and place. Of the others what they move, times what that costs in the
    same place of the blocks around them; where that is not known of a place, the sets of a block share by what they
    move.
    """
    costs: dict[tuple[int, str], float] = {}
    for place in {one.place for one in sets}:
        moved = {one.block: one.moved for one in sets if one.place == place}
        of_place = {block: kl for (block, where), kl in known.items() if where == place}
        if of_place and min(of_place) <= min(moved) and max(of_place) >= max(moved):
            costs.update({(block, place): kl for block, kl in interpolated(of_place, moved).items()})
    out = []
    for one in sets:
        siblings = [other for other in sets if other.block == one.block]
        complete = all((other.block, other.place) in costs for other in siblings)
        parts = [costs[other.block, other.place] if complete else other.moved for other in siblings]
        mine = costs[one.block, one.place] if complete else one.moved
        out.append(max(mine, 1e-12) / sum(max(part, 1e-12) for part in parts))
    return out


def probed_blocks(num_blocks: int, most: int = MOST_PROBES) -> list[int]:
    """The blocks that are probed: all, or `most` at even distances, the first and the last among them."""
    if num_blocks <= most:
        return list(range(num_blocks))
    return sorted({round(i * (num_blocks - 1) / (most - 1)) for i in range(most)})


def interpolated(known: Mapping[int, float], moved: Mapping[int, float]) -> dict[int, float]:
    """The divergence of each block: as measured, or its movement times what one costs between the blocks around it.

    known: divergences by block. moved: how far the output of each block moves.
    """
    gain = {block: max(kl, 1e-12) / max(moved[block], 1e-30) for block, kl in known.items()}
    out = {}
    for block, distance in moved.items():
        if block in known:
            out[block] = max(known[block], 0.0)
            continue
        before = max(b for b in known if b < block)
        after = min(b for b in known if b > block)
        way = (block - before) / (after - before)
        out[block] = distance * math.exp((1 - way) * math.log(gain[before]) + way * math.log(gain[after]))
    return out


def monotone(errors: Mapping[str, float]) -> dict[str, float]:
    """Errors by option, smallest option first, none above that of a smaller one."""
    out: dict[str, float] = {}
    least = math.inf
    for name, error in errors.items():
        least = min(least, error)
        out[name] = least
    return out


# ---- one block -----------------------------------------------------------------------------------------


def _block(
    model: StreamedModel,
    loaded: LoadedBlock,
    plan: LayerPlan,
    menu: Menu,
    paths: _Paths,
    found: _Found,
    *,
    probe: bool,
) -> None:
    """Measure a block's sets, and walk every path through it; see the module docstring."""
    index = loaded.index
    first = paths.original[0]
    output = loaded.forward(first, {})
    weights: dict[str, Tensor] = {}
    mine: dict[tuple[int, str], Tensor] = {}
    for group, statistics in zip(loaded.groups, loaded.statistics, strict=True):
        names = [name for name in group.layers if not plan[loaded.prefix + name].is_dense]
        options = menu.options(group.in_features)
        if not names or not any(option.weight for option in options):
            continue
        errors, rounded = _rounded(loaded, group, names, statistics, options)
        weights.update(rounded)
        changed = loaded.forward(first, rounded)
        one = _Set(
            block=index,
            layers=[loaded.prefix + name for name in names],
            errors=errors,
            moved=_moved(changed, output),
        )
        found.sets.append(one)
        if probe:
            mine[index, one.place] = paths.few(changed).clone()
        statistics.clear()
    found.moved[index] = _moved(loaded.forward(first, weights), output) / float(output.double().square().mean())
    if probe:
        paths.probes[index] = [loaded.forward(h, weights) for h in paths.original]
    paths.rounded = [loaded.forward(h, weights) for h in paths.rounded]
    for key, hidden in [(None, paths.original), *paths.probes.items()]:
        if key != index:
            hidden[:] = [model.run_block(index, h) for h in hidden]
    paths.sets = {where: model.run_block(index, hidden) for where, hidden in paths.sets.items()} | mine


def _moved(changed: Tensor, output: Tensor) -> float:
    """Mean squared change of a block's output."""
    return float((changed - output).double().square().mean())


def _rounded(
    loaded: LoadedBlock,
    group: Group,
    names: Sequence[str],
    statistics: InputStatistics,
    options: Sequence[LayerScheme],
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Errors of a set's options over that of its probe, and its parameters, rounded in the probe."""
    layers = {name: loaded.module.get_submodule(name) for name in names}
    weights = [weight_OI(layer).float() for layer in layers.values()]
    stacked_OI = torch.cat(weights)
    errors, changed_OI = _compared(stacked_OI, statistics, options)
    parts = changed_OI.split([len(w) for w in weights])
    return errors, {
        f"{name}.weight": part.t() if is_conv1d(layer) else part
        for (name, layer), part in zip(layers.items(), parts, strict=True)
    }


def _compared(
    w_OI: Tensor, statistics: InputStatistics, options: Sequence[LayerScheme]
) -> tuple[dict[str, float], Tensor]:
    """Errors of a linear's options over that of its probe, by a sample of its rows; and all of it in the probe."""
    gram_II, columns = statistics.gram_II, w_OI.shape[1]
    integer = [option.weight for option in options if option.weight is not None]
    coarsest = max(integer, key=lambda scheme: scheme.group_size)
    inputs = prepare(gram_II, coarsest, kept_share(columns, statistics.num_tokens))
    middle = probe_of(integer)
    rows_OI = awq.sampled_rows(w_OI, SAMPLED_ROWS)

    def changed(part_OI: Tensor, scheme: Scheme) -> Tensor:
        mine = divided(inputs, coarsest.groups(columns), scheme.groups(columns))
        return head.rounded(part_OI, mine, gram_II, scheme).dequantize(scheme)

    lost = {
        label(LayerScheme(weight=scheme)): awq.output_error(changed(rows_OI, scheme).sub_(rows_OI), gram_II)
        for scheme in integer
    }
    of_probe = max(lost[label(LayerScheme(weight=middle))], 1e-30)
    errors = {label(o): 0.0 if o.weight is None else lost[label(o)] / of_probe for o in options}
    return errors, changed(w_OI, middle)


def _head(model: StreamedModel, hidden: Sequence[Tensor], held: list[Tensor], menu: Menu) -> _Set:
    """The output matrix as a set: its options' errors on rows of the Gram matrix, its divergence on those held out."""
    name = head.head_of(model)
    statistics = head.head_statistics(model, hidden)
    w_VH = model.checkpoint.tensor(f"{name}.weight").to(model.device, torch.float32)
    errors, changed_VH = _compared(w_VH, statistics, menu.options(w_VH.shape[1]))
    moved = head_divergence(model, held, changed_VH)
    return _Set(block=model.num_blocks, layers=[name], errors=errors, moved=moved, behind=True)


def probe_of(schemes: Sequence[Scheme]) -> Scheme:
    """The scheme that stands for rounding as such: of the fewest bits, in the middle of the group sizes."""
    fewest = min(scheme.num_bits for scheme in schemes)
    of_them = sorted((s for s in schemes if s.num_bits == fewest), key=lambda scheme: scheme.group_size)
    return of_them[len(of_them) // 2]


def divided(inputs: Prepared, num_groups: int, wanted: int) -> Prepared:
    """The same factor for smaller groups, which come in the order of the large ones that they lie in."""
    parts = wanted // num_groups
    return replace(inputs, order=[group * parts + part for group in inputs.order for part in range(parts)])


def _digits(value: float) -> float:
    """Enough digits to choose by, few enough to be stable from run to run on a GPU."""
    return float(f"{value:.5g}")
