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
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from compress import distributed
from compress.background import BackgroundStore
from compress.block import BlockDone, BlockResult, BlockStore, LoadedBlock
from compress.errors import ArtifactError, ConfigError
from compress.groups import Group, find_groups
from compress.linear import linears, set_weight_OI
from compress.model import StreamedModel
from compress.statistics import InputStatistics, collecting

# Tokens run through a block at once: large enough for fast matrix products, small enough that a block's
# activations stay below its weights.
BATCH_TOKENS = 2048
GPU_BATCH_TOKENS = 8192
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
    method: Callable[[LoadedBlock], BlockResult],
    store: BlockStore,
    *,
    paths: int = 1,
    num_parts: int = 1,
    on_stage: Callable[[int, str], None] = lambda index, stage: None,
) -> Iterator[BlockDone]:
    """Compress every block in order; yields after each.

    ids_NT: int64 `[N, T]` calibration tokens. paths: 1 when every block is measured on the original model's hidden
    states (one pass over the tokens), 2 when it is measured on those of the model compressed so far and told the
    difference (three passes). num_parts: how many runs of batches the statistics are summed in, in this process, before
    the sums are added. Of several processes (`distributed`) each runs its part of the rows, and all must call this
    alike. Deterministic: the same model, ids and method give the same bytes, also when some blocks come from the store.
    """
    on_gpu = model.device.type == "cuda"
    batch = max(1, (GPU_BATCH_TOKENS if on_gpu else BATCH_TOKENS) // ids_NT.shape[1])
    batches = distributed.parts(ids_NT.split(batch), distributed.num_processes())[distributed.rank()]
    if not batches:
        raise ConfigError(
            f"{ids_NT.shape[0]} calibration rows make fewer batches of {batch} rows than there are processes "
            f"({distributed.num_processes()}); start fewer, or pass more --samples"
        )
    original = model.embed_batches(torch.cat(batches), batch)
    # One list while the two paths are equal, that is, up to the first block; then, with two paths, a list each.
    compressed = original
    probe = model.embed(ids_NT[:1, :PROBE_TOKENS])
    known: dict[tuple[Any, ...], list[Group]] = {}
    with torch.no_grad(), BackgroundStore(store) if on_gpu else nullcontext(store) as store:
        for index in range(model.num_blocks):
            # Weights are searched and folds proven in float32; only the passes over the tokens may be coarser.
            module = model.load_block(index, torch.float32)
            if on_gpu and index + 1 < model.num_blocks:
                model.prefetch_block(index + 1)
            prefix = model.block_prefix(index)
            structure = _structure(module)
            if structure not in known:
                on_stage(index, "finding groups")
                # Always from the original weights of the first such block, so that a resumed run finds the same.
                known[structure] = find_groups(module, partial(model.run_exact, index, probe))
            result = store.load(index)
            resumed = result is not None
            if paths == 2 and original is compressed:
                original = list(original)  # from here on each path has its own batches
            if result is None:
                on_stage(index, "collecting statistics")
                statistics, check_input, check_output = _collect(
                    model, index, known[structure], original, compressed, num_parts
                )
                on_stage(index, "searching")
                result = method(
                    LoadedBlock(
                        index=index,
                        prefix=prefix,
                        module=module,
                        groups=known[structure],
                        statistics=statistics,
                        run=partial(model.run_exact, index, check_input),
                        check_input=check_input,
                        check_output=check_output,
                        inputs=compressed if paths == 2 else [],
                        targets=original if paths == 2 else [],
                        forward=partial(model.run_with, index),
                    )
                )
                store.save(index, prefix, result)
            else:
                _advance(model, index, original)
            if paths == 2 and index + 1 < model.num_blocks:  # nobody needs the last block's outputs
                on_stage(index, "running the compressed block")
                install(module, result)
                _advance(model, index, compressed)
            probe = distributed.from_first(original[0][:1, :PROBE_TOKENS])
            _check_finite(original, prefix)
            model.release_block(index)
            return_freed_memory()
            yield BlockDone(index=index, total=model.num_blocks, resumed=resumed, report=result.report)


def _collect(
    model: StreamedModel,
    index: int,
    groups: list[Group],
    original: list[Tensor],
    compressed: list[Tensor],
    num_parts: int = 1,
) -> tuple[list[InputStatistics], Tensor, Tensor]:
    """Run every batch through the loaded block, on both paths where they differ; `original` becomes its outputs.

    Returns the statistics of the compressed path's inputs, the first rows of that path, and the block's output on them.
    """
    check_input = compressed[0][: _check_rows(compressed)]
    check_output = check_input
    ends = list(accumulate(len(part) for part in distributed.parts(original, num_parts)))[:-1]
    with collecting(model.blocks[index], groups, model.device) as collector:
        for i in range(len(original)):
            before, other = original[i], compressed[i]
            collector.keeping = before is not other
            original[i] = out = model.run_block(index, before)
            if collector.keeping:
                collector.keeping = False
                out = model.run_block(index, other)
            if i == 0:
                check_output = out[: len(check_input)]
            if i + 1 in ends:
                for statistics in collector.statistics:
                    statistics.close_part()
    check_input, check_output = distributed.from_first(check_input), distributed.from_first(check_output)
    if model.dtype != torch.float32:
        check_input = check_input.float()
        check_output = model.run_exact(index, check_input)
    return collector.statistics, check_input, check_output


def _advance(model: StreamedModel, index: int, hidden: list[Tensor]) -> None:
    """Replace each batch by the loaded block's output on it; in place, so that only one set is held."""
    for i, h in enumerate(hidden):
        hidden[i] = model.run_block(index, h)


def _check_rows(hidden: list[Tensor]) -> int:
    seq_len = hidden[0].shape[1]
    total = distributed.add_up_count(sum(h.shape[0] for h in hidden), hidden[0].device) * seq_len
    tokens = min(CHECK_TOKENS[1], max(CHECK_TOKENS[0], total // CHECK_SHARE))
    return min(hidden[0].shape[0], max(1, tokens // seq_len))


def install(module: nn.Module, result: BlockResult) -> None:
    """Give a loaded block the weights as they were stored: dequantized integers and rounded tensors."""
    layers = linears(module)
    for name, q in result.quantized.items():
        set_weight_OI(layers[name], q.dequantize())
    state = module.state_dict()
    for name, value in result.dense.items():
        state[name].copy_(value)


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
