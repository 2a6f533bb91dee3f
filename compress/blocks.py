"""One decoder block at a time: the loop that every compression method shares.

For each block: load its weights, run the calibration batches through it to collect statistics, hand it to the
method, and store what the method returns. The batches follow one path, the original model's, or two: beside it that of
the model as compressed so far, for a method that corrects what the blocks before did wrong. Peak memory is one block
with its statistics plus the calibration set's hidden states (twice with two paths), whatever the depth of the model.

Shapes: N samples, B batch, T tokens, H hidden size
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from compress import activations, distributed
from compress.background import BackgroundStore
from compress.block import BlockDone, BlockResult, BlockStore, LoadedBlock
from compress.errors import ArtifactError, ConfigError, resumable
from compress.groups import Group, find_groups
from compress.kv_cache import relative_errors
from compress.linear import is_conv1d, linears
from compress.model import StreamedModel
from compress.plan import LayerPlan
from compress.statistics import InputStatistics, Wanted, collecting
from compress.tell import SILENT, Tell

# Tokens run through a block at once: large enough for fast matrix products, small enough that a block's
# activations stay below its weights.
BATCH_TOKENS = 2048
GPU_BATCH_TOKENS = 8192
# A narrow block's products are done before the next is launched, so a GPU takes more tokens there: as many as have this
# many hidden numbers (those of 8192 tokens of width 4096), up to a limit.
_GPU_BATCH_NUMBERS = 2**25
_GPU_BATCH_MOST = 32768
_C_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None
# Tokens that the folds are looked for with; enough for attention to mix.
PROBE_TOKENS = 16
# Tokens of the true forwards that confirm a choice: a share of the calibration set, within these bounds. Each choice
# costs three of them, so they must stay cheap beside the passes over the whole set.
CHECK_TOKENS = (512, 2048)
CHECK_SHARE = 64


def stream(
    model: StreamedModel,
    ids_NT: Tensor,
    method: Callable[[LoadedBlock], BlockResult | None],
    store: BlockStore | None = None,
    *,
    plan: LayerPlan | None = None,
    paths: int = 1,
    wanted: Wanted | None = None,
    blocks: Sequence[int] | None = None,
    reshaping: Reshaping | None = None,
    num_parts: int = 1,
    behind: Callable[[list[Tensor]], BlockResult | None] | None = None,
    tell: Tell = SILENT,
) -> Iterator[BlockDone]:
    """Hand every block to `method` in order; yields after each. The caller's grad mode is its own between blocks.

    ids_NT: int64 `[N, T]` calibration tokens. method: a result of None leaves the block as it was, which is all that a
    pass that only measures does; it needs no `store`. plan: says whose inputs are quantized once the method is done,
    and how keys and values are then held on the path of the compressed model. paths: 1 when every block is measured on
    the original model's hidden states (one pass over the tokens), 2 when it is measured on those of the model
    compressed so far and told the difference (three passes). wanted: of the statistics. blocks: those that go on,
    ascending; the others are bypassed on the only path, or on that of the compressed model. reshaping: with two paths,
    what else changes where blocks become smaller.
    num_parts: how many runs of rows the statistics are summed in, in this process, before the sums are added.
    behind: what is done behind the last block, told the original model's final hidden states batch by batch; kept in
    the store as one block more, whose tensors have their full names. Of
    several processes (`distributed`) each runs its part of the rows, and all must call this alike. Deterministic: the
    same model, ids and method give the same bytes, also when some blocks come from the store.
    """
    on_gpu = model.device.type == "cuda"
    chosen = list(range(model.num_blocks) if blocks is None else blocks)
    with torch.no_grad():
        walk = _Walk(model, ids_NT, method, plan or LayerPlan(), paths, wanted or Wanted(), num_parts, tell)
        if paths == 2:
            walk.enter(reshaping or Reshaping(), range(chosen[0]))
    keeping = resumable() if store else nullcontext()
    with BackgroundStore(store) if on_gpu and store else nullcontext(store) as kept, keeping:
        for position, (index, following) in enumerate(zip(chosen, [*chosen[1:], None], strict=True)):
            with torch.no_grad():
                result, resumed = walk.visit(index, position, following, kept)
            report = {} if result is None else result.report
            yield BlockDone(index=position, source=index, total=len(chosen), resumed=resumed, report=report)
        if behind is not None:
            with torch.no_grad():
                result, resumed = walk.end(behind, len(chosen), kept)
            report = {} if result is None else result.report
            last = model.num_blocks
            yield BlockDone(index=len(chosen), source=last, total=len(chosen), resumed=resumed, report=report)


def batch_rows(model: StreamedModel, seq_len: int) -> int:
    """Rows of `seq_len` tokens that go on at once, also where every one of them has as many logits as there are ids."""
    return max(1, (GPU_BATCH_TOKENS if model.device.type == "cuda" else BATCH_TOKENS) // seq_len)


def block_rows(model: StreamedModel, seq_len: int) -> int:
    """Rows of `seq_len` tokens that run through a block at once, where nothing but blocks is run."""
    if model.device.type != "cuda":
        return batch_rows(model, seq_len)
    width = int(model.embedding.weight.shape[1])
    return max(1, min(_GPU_BATCH_MOST, max(GPU_BATCH_TOKENS, _GPU_BATCH_NUMBERS // width)) // seq_len)


@dataclass(frozen=True, kw_only=True)
class Reshaping:
    """What the compressed path needs beside weights of other shapes. enter(h): what enters its first block.

    attributes: of a block's modules, by name, that follow from its shapes: `{"attn": {"num_key_value_groups": 2}}`.
    """

    enter: Callable[[Tensor], Tensor] | None = None
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


_Collected = tuple[list[InputStatistics], Tensor, Tensor, list[Tensor]]


class _Walk:
    """The calibration batches on their way through the blocks, on one path or two, and what was found so far."""

    def __init__(
        self,
        model: StreamedModel,
        ids_NT: Tensor,
        method: Callable[[LoadedBlock], BlockResult | None],
        plan: LayerPlan,
        paths: int,
        wanted: Wanted,
        num_parts: int,
        tell: Tell,
    ) -> None:
        self.model, self.method, self.plan, self.paths, self.wanted = model, method, plan, paths, wanted
        self.tell = tell
        # Rows are shared, and not batches of them: parts are then the same whatever a batch is.
        first, last = distributed.bounds(len(ids_NT), distributed.num_processes())[distributed.rank()]
        if first == last:
            raise ConfigError(
                f"{len(ids_NT)} calibration rows are fewer than there are processes ({distributed.num_processes()}); "
                "start fewer, or pass more --samples"
            )
        # Behind its own tokens a process finds no position, before them none of its count.
        self.positions = wanted.positions(ids_NT.numel()) - ids_NT[:first].numel()
        batch = block_rows(model, ids_NT.shape[1])
        runs = [ids_NT[first:last][a:b].split(batch) for a, b in distributed.bounds(last - first, num_parts) if a < b]
        # Numbers of the batches that end a part, but for the last.
        self.ends = list(accumulate(len(run) for run in runs))[:-1]
        self.original = model.embed_batches([rows for run in runs for rows in run])
        # One list while the two paths are equal, that is, up to the first block; then, with two paths, a list each.
        self.compressed = self.original
        self.probe = model.embed(ids_NT[:1, :PROBE_TOKENS])
        self.known: dict[tuple[Any, ...], list[Group]] = {}
        self.attributes: Mapping[str, Mapping[str, Any]] = {}
        self.narrow = False

    def enter(self, reshaping: Reshaping, bypassed: Sequence[int]) -> None:
        """Part the two paths where the compressed one differs before its first block."""
        self.attributes = reshaping.attributes
        self.narrow = reshaping.enter is not None
        if reshaping.enter is not None:
            self.compressed = [reshaping.enter(h) for h in self.original]
        for index in bypassed:
            self._part_ways()
            self._bypass(index)

    def visit(
        self, index: int, position: int, following: int | None, store: BlockStore | None
    ) -> tuple[BlockResult | None, bool]:
        """Block `index`, which is number `position` of those that go on; its result, and whether it was read back."""
        model, prefix = self.model, self.model.block_prefix(index)
        # Weights are searched and folds proven in float32; only the passes over the tokens may be coarser.
        module = model.load_block(index, torch.float32)
        if model.device.type == "cuda" and following is not None:
            model.prefetch_block(following)
        groups = self._groups(index, module)
        result = store.load(position) if store else None
        resumed = result is not None
        self._part_ways()
        collected = None
        if result is None:
            collected = self._collect(index, groups)
        else:
            _advance(model, index, self.original)
        if self.paths == 2:
            for bypassed in range(index + 1, model.num_blocks if following is None else following):
                self._bypass(bypassed)
        if collected is not None:
            loaded = self._shown(index, prefix, module, groups, collected)
            self.tell.step(doing="searching")
            result = self.method(loaded)
            if store and result is not None:
                store.save(position, _renumbered(prefix, index, position), result)
            del loaded, collected
        if self.paths == 2 and following is not None:  # nobody needs the last block's outputs
            self.tell.step(doing="running the compressed block")
            if result is not None:
                install(module, result, self.plan, prefix)
            held, model.kv = model.kv, self.plan.kv
            with with_attributes(module, self.attributes):
                _advance(model, index, self.compressed)
            model.kv = held
        self._leave(index)
        return result, resumed

    def end(
        self, behind: Callable[[list[Tensor]], BlockResult | None], position: int, store: BlockStore | None
    ) -> tuple[BlockResult | None, bool]:
        """What lies behind the blocks; its result, and whether it was read back."""
        result = store.load(position) if store else None
        if result is not None:
            return result, True
        self.tell.step(doing="searching")
        result = behind(self.original)
        if store and result is not None:
            store.save(position, "", result)
        return result, False

    def _bypass(self, index: int) -> None:
        """A block that does not go on: only the original model, whose path is another, runs it."""
        self.model.load_block(index, torch.float32)
        _advance(self.model, index, self.original)
        self._leave(index)

    def _part_ways(self) -> None:
        if self.paths == 2 and self.original is self.compressed:
            self.original = list(self.original)  # from here on each path has its own batches

    def _leave(self, index: int) -> None:
        self.probe = distributed.from_first(self.original[0][:1, :PROBE_TOKENS])
        _check_finite(self.original, self.model.block_prefix(index))
        self.model.release_block(index)
        return_freed_memory()

    def _groups(self, index: int, module: nn.Module) -> list[Group]:
        structure = _structure(module)
        if structure not in self.known:
            self.tell.step(doing="finding groups")
            # Always from the original weights of the first such block, so that a resumed run finds the same.
            self.known[structure] = find_groups(module, partial(self.model.run_exact, index, self.probe))
        return self.known[structure]

    def _shown(
        self, index: int, prefix: str, module: nn.Module, groups: list[Group], collected: _Collected
    ) -> LoadedBlock:
        """The block as the method sees it."""
        statistics, check_input, check_output, sources = collected
        return LoadedBlock(
            index=index,
            prefix=prefix,
            module=module,
            groups=groups,
            statistics=statistics,
            run=partial(self.model.run_exact, index, check_input),
            check_input=check_input,
            check_output=check_output,
            inputs=self.compressed if self.paths == 2 else [],
            targets=self.original if self.paths == 2 else [],
            sources=sources,
            forward=partial(self.model.run_with, index),
            cache_errors=partial(relative_errors, partial(self.model.run_cached, index, check_input), check_input),
        )

    def _collect(self, index: int, groups: list[Group]) -> _Collected:
        """Run every batch through the loaded block, on both paths where they differ; `original` becomes its outputs.

        Returns the statistics of the compressed path's inputs, the first rows of that path, the block's output on
        them, and, if wanted, all rows of the original path. Where the compressed path has another width, the first rows
        are of the original one.
        """
        self.tell.step(doing="collecting statistics")
        model, original, wanted = self.model, self.original, self.wanted.statistics
        compressed = original if self.narrow else self.compressed
        check_input = compressed[0][: _check_rows(compressed)]
        check_output = check_input
        sources = list(original) if self.wanted.sources else []
        collected = groups if wanted else []
        with collecting(model.blocks[index], collected, model.device, self.wanted, self.positions) as collector:
            for i in range(len(original)):
                before, other = original[i], compressed[i]
                collector.keeping = before is not other
                original[i] = out = model.run_block(index, before)
                if collector.keeping and (wanted or i == 0):
                    collector.keeping = False
                    out = model.run_block(index, other)
                if i == 0:
                    check_output = out[: len(check_input)]
                if i + 1 in self.ends:
                    for statistics in collector.statistics:
                        statistics.close_part()
        check_input, check_output = distributed.from_first(check_input), distributed.from_first(check_output)
        if model.dtype != torch.float32:
            check_input = check_input.float()
            check_output = model.run_exact(index, check_input)
        return collector.statistics, check_input, check_output, sources


def _renumbered(prefix: str, index: int, position: int) -> str:
    """What names of a block's tensors begin with once it is number `position` of the model."""
    assert prefix.endswith(f".{index}.") or prefix == f"{index}."
    return f"{prefix.removesuffix(f'{index}.')}{position}."


def _advance(model: StreamedModel, index: int, hidden: list[Tensor]) -> None:
    """Replace each batch by the loaded block's output on it; in place, so that only one set is held."""
    for i, h in enumerate(hidden):
        hidden[i] = model.run_block(index, h)


def _check_rows(hidden: list[Tensor]) -> int:
    seq_len = hidden[0].shape[1]
    total = distributed.add_up_count(sum(h.shape[0] for h in hidden), hidden[0].device) * seq_len
    tokens = min(CHECK_TOKENS[1], max(CHECK_TOKENS[0], total // CHECK_SHARE))
    return min(hidden[0].shape[0], max(1, tokens // seq_len))


def install(module: nn.Module, result: BlockResult, plan: LayerPlan | None = None, prefix: str = "") -> None:
    """Give a loaded block the weights as they were stored: dequantized integers and rounded tensors, of any shape.

    plan: whose layers, called by `prefix` and their name in the block, quantize their inputs from now on.
    """
    layers = linears(module)
    for name, q in result.quantized.items():
        layer = layers[name]
        weight_OI = q.dequantize()
        _put(layer, "weight", weight_OI.t() if is_conv1d(layer) else weight_OI)
        scheme = None if plan is None else plan.get(prefix + name)
        if scheme is not None and scheme.input is not None:
            activations.install(layer, q, scheme.input, result.inputs.get(name))
    for name, value in result.dense.items():
        owner, _, leaf = name.rpartition(".")
        _put(module.get_submodule(owner), leaf, value)


@contextmanager
def with_attributes(module: nn.Module, attributes: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """The block with other values of its modules' attributes; put back afterwards."""
    owners = {name: module.get_submodule(name) for name in attributes}
    held = {name: {key: getattr(owner, key) for key in attributes[name]} for name, owner in owners.items()}

    def put(values: Mapping[str, Mapping[str, Any]]) -> None:
        for name, owner in owners.items():
            for key, value in values[name].items():
                setattr(owner, key, value)

    put(attributes)
    try:
        yield
    finally:
        put(held)


def _put(owner: nn.Module, leaf: str, value: Tensor) -> None:
    """Overwrite a parameter or buffer in place, or, where the shape changes, put another there."""
    held = owner._parameters.get(leaf)
    old = owner._buffers[leaf] if held is None else held.data
    assert old is not None
    if old.shape == value.shape:
        old.copy_(value)
    elif held is None:
        owner._buffers[leaf] = value.to(old.device, old.dtype)
    else:
        owner._parameters[leaf] = nn.Parameter(value.to(old.device, old.dtype), requires_grad=False)


def return_freed_memory() -> None:
    """Give the allocator's free pages back to the system.

    glibc keeps what is freed below a living allocation; over a hundred blocks that adds up to the size of the model.
    Does nothing where the C library has no `malloc_trim`.
    """
    trim = getattr(_C_LIBRARY, "malloc_trim", None)
    if trim is not None:
        trim(0)


def _structure(module: nn.Module) -> tuple[Any, ...]:
    """Blocks with equal structure have equal groups: module types and parameter shapes by name."""
    types = tuple((name, type(m).__name__) for name, m in module.named_modules())
    return types, tuple((name, tuple(p.shape)) for name, p in module.named_parameters())


def _check_finite(hidden: list[Tensor], prefix: str) -> None:
    if not all(bool(torch.isfinite(h).all()) for h in hidden):
        raise ArtifactError(
            f"{prefix.rstrip('.')}: its output on the calibration text is not finite; the model overflows in this "
            "dtype (try --dtype float32) or its weights are damaged"
        )
