"""What each choice for each set of linears would cost the whole model, in KL divergence, without a gradient.

Three measurements, in one pass over the model, a block in memory at a time:

1. Of every set of linears that share an input (q, k, v; o; gate, up; down) and every option of the menu: the
   output error `tr(D H D^T)` after error feedback and refitted scales, on the Gram matrix H of calibration rows and a
   sample of the weight's rows. It tells options of one set from each other.
2. Of every set, rounded whole in the option in the middle (the *probe*): how far the block's output moves, on rows that
   H has not seen. It tells the sets of a block from each other: what an error does behind q is not what it does behind
   `down`.
3. Of every block (of some, in deep models) rounded whole in its probes, the rest of the model as it was: the true KL
   divergence of the next token, on the same rows. It tells blocks from each other. All of these models walk through
   the blocks side by side, each branching off where it differs, as in `prune.depth`. One more has all blocks rounded:
   what its divergence is over the sum of the single ones corrects all figures for what errors do to each other.

The output matrix, if it is chosen for, is a set of its own: rounded whole in its probe, its divergence is measured.

So `kl[set][option] = KL(block) * share of the set in the block's movement * error(option) / error(probe) * correction`.
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


@dataclass(kw_only=True)
class _Found:
    """What is known so far. moved: how far each block's output moves, all its sets rounded, over its own square."""

    moved: dict[int, float] = field(default_factory=dict)
    sets: list[_Set] = field(default_factory=list)


@dataclass(kw_only=True)
class _Paths:
    """Hidden states of the rows that divergences are measured on: of the original, of each probe, and all rounded."""

    original: list[Tensor]
    rounded: list[Tensor]
    probes: dict[int, list[Tensor]] = field(default_factory=dict)


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
    entering = model.embed_batches(ids_NT[len(ids_NT) - held :], batch_rows(model, ids_NT.shape[1]))
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
    blocks = interpolated(dict(zip(paths.probes, kl[1:], strict=True)), found.moved)
    total = sum(blocks.values())
    correction = kl[0] / total if total > 0 else 1.0
    return {
        "gram_tokens": rows_NT.numel(),
        "probe_tokens": held * ids_NT.shape[1],
        "probes": {str(block): _digits(value) for block, value in zip(paths.probes, kl[1:], strict=True)},
        "all_rounded": _digits(kl[0]),
        "correction": _digits(correction),
        "sets": [
            _priced(one, found.sets, one.moved if one.behind else blocks[one.block] * correction) for one in found.sets
        ],
    }


def _priced(one: _Set, sets: Sequence[_Set], block_kl: float) -> dict[str, Any]:
    """A set as it is reported: its part of what its block costs, by option."""
    total = sum(other.moved for other in sets if other.block == one.block)  # of what lies behind, itself
    probe = block_kl * (one.moved / total if total > 0 else 1.0)
    kl = {name: _digits(probe * error) for name, error in monotone(one.errors).items()}
    return {"block": one.block, "layers": one.layers, "kl": kl}


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
    for group, statistics in zip(loaded.groups, loaded.statistics, strict=True):
        names = [name for name in group.layers if not plan[loaded.prefix + name].is_dense]
        options = menu.options(group.in_features)
        if not names or not any(option.weight for option in options):
            continue
        errors, rounded = _rounded(loaded, group, names, statistics, options)
        weights.update(rounded)
        full = [loaded.prefix + name for name in names]
        moved = _moved(loaded.forward(first, rounded), output)
        found.sets.append(_Set(block=index, layers=full, errors=errors, moved=moved))
        statistics.clear()
    found.moved[index] = _moved(loaded.forward(first, weights), output) / float(output.double().square().mean())
    if probe:
        paths.probes[index] = [loaded.forward(h, weights) for h in paths.original]
    paths.rounded = [loaded.forward(h, weights) for h in paths.rounded]
    for key, hidden in [(None, paths.original), *paths.probes.items()]:
        if key != index:
            hidden[:] = [model.run_block(index, h) for h in hidden]


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
