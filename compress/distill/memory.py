"""Will a run fit, before its first step, and if not, what would.

Weights, gradients and optimizer are counted; activations are measured on two short rows of the student itself and
scaled to a pass (what grows from one to the other grows with the tokens; the rest, such as weights in the products'
dtype, does not); the loss holds a few blocks of logits whatever the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.errors import ConfigError
from compress.losses import at_once
from compress.losses.in_blocks import CPU_BLOCK, GPU_BLOCK

PROBE_TOKENS = (64, 128)
MARGIN = 1.1
# Of a block's activations, what is left once it is compiled, whose backward pass computes again what is cheap: 0.63 to
# 0.64 of Llama blocks of 576 and 2048 channels in bfloat16, counted as in `probe`.
COMPILED = 0.7
# Arrays of a block's size that the loss holds at once, all float32.
_LOSS_ARRAYS = 7
# Of compiled losses: both models' logits in float32, and a gradient of 16 bits.
_AT_ONCE_ARRAYS = 2.5
# Of free memory, what a run may be predicted to need and still keep whole what it could share out.
ROOM = 0.6


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run holds in a process, in numbers: see `total`.

    trained, frozen: parameters of the student. compute_bytes: of a number in matrix products. tokens: of a pass.
    token_bytes: activations a token without checkpointing; kept_bytes: with it. shares: processes that share weights;
    gathered, teacher_gathered: parameters that each of those has whole at once, of both models. whole: each keeps the
    teacher, and what it gathered of the student until the backward pass is through.
    vocabulary: its entries. at_once: whether losses are computed as `at_once.total` does.
    """

    trained: int
    frozen: int
    compute_bytes: int
    teacher_parameters: int
    teacher_bytes: float
    tokens: int
    token_bytes: float
    kept_bytes: float
    checkpointing: bool
    shares: int
    on_gpu: bool
    vocabulary: int = 0
    at_once: bool = False
    gathered: int = 0
    teacher_gathered: int = 0
    whole: bool = False

    def total(self) -> int:
        """Bytes in one process: master weights, gradients and two moments (16 a trained parameter), the teacher, a copy
        of the weights in the products' dtype, activations, the loss."""
        weights = (16 * self.trained + 4 * self.frozen) / self.shares
        copy = self.compute_bytes * (self.trained + self.frozen) if self.compute_bytes < 4 else 0
        teacher = self.teacher_parameters * self.teacher_bytes
        if self.shares > 1:  # weights, their gradients, and these in float32, as they are added up
            copy = (2 * self.compute_bytes + 4) * self.gathered
            if self.whole:
                copy += 4 * (self.trained + self.frozen)  # or fewer bytes each
            else:
                teacher = teacher / self.shares + self.teacher_gathered * self.teacher_bytes
        activations = self.tokens * (self.kept_bytes if self.checkpointing else self.token_bytes)
        rows, columns = GPU_BLOCK if self.on_gpu else CPU_BLOCK
        loss: float = 4 * _LOSS_ARRAYS * min(rows, self.tokens) * columns
        if self.at_once:
            loss = max(loss, 4 * _AT_ONCE_ARRAYS * min(at_once.BUDGET, self.tokens * self.vocabulary))
        return int(MARGIN * (weights + copy + teacher + activations + loss))


def probe(
    model: nn.Module, base: nn.Module, num_blocks: int, hidden_size: int, compute: torch.dtype
) -> tuple[float, float]:
    """Bytes of activations that a token leaves for the backward pass: (all, with checkpointed blocks)."""
    fewer, more = (_kept(model, base, tokens, compute) for tokens in PROBE_TOKENS)
    whole = (more - fewer) / (PROBE_TOKENS[1] - PROBE_TOKENS[0])
    return whole, num_blocks * hidden_size * 4 + whole / max(1, num_blocks)


def _kept(model: nn.Module, base: nn.Module, tokens: int, compute: torch.dtype) -> int:
    """Bytes that autograd keeps of a row through the model without its head, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return value

    device = next(model.parameters()).device
    ids = torch.arange(tokens, device=device)[None] % base.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    with (
        torch.autocast(device.type, compute, enabled=compute != torch.float32),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
    ):
        out = base(input_ids=ids, use_cache=False).last_hidden_state
    del out
    return sum(seen.values())


def require(needs: Needs, free: int, others: Sequence[tuple[str, Needs]]) -> None:
    """ConfigError when the run does not fit, naming what would: of (options, needs with them), the first that does."""
    if needs.total() <= free:
        return
    fitting = [(options, n.total()) for options, n in others if n.total() <= free]
    if fitting:
        way = f"{fitting[0][0]} needs {_gb(fitting[0][1])} and fits"
    else:
        least = min(others, key=lambda o: o[1].total())
        way = f"even {least[0]} needs {_gb(least[1].total())}: use a smaller student or more memory"
    raise ConfigError(f"a pass is predicted to need {_gb(needs.total())} of memory and {_gb(free)} are free; {way}")


def has_room(needs: Needs, free: int) -> bool:
    """Whether processes that share weights have memory to keep them whole, which saves them sending."""
    return replace(needs, whole=True).total() <= ROOM * free


def ways_out(needs: Needs, *, seq_len: int, lora: Needs, may_cache: bool) -> list[tuple[str, Needs]]:
    """What a user can do about too little memory, mildest first; each adds to the one before it."""
    smaller = replace(needs, tokens=min(needs.tokens, seq_len))
    checkpointed = replace(smaller, checkpointing=True)
    out = [("--micro-batch 1", smaller), ("--micro-batch 1 --checkpointing", checkpointed)]
    short = "--micro-batch 1 --checkpointing"
    if needs.teacher_parameters:
        held = replace(checkpointed, teacher_bytes=min(1.01, needs.teacher_bytes))
        out.append((f"{short} --teacher-dtype w8a16", held))
        if may_cache:
            cached = replace(checkpointed, teacher_parameters=0)
            out.append((f"{short} --cache FOLDER (made by compress teach)", cached))
            lora = replace(lora, teacher_parameters=0)
            short += " --cache FOLDER"
    lighter = replace(lora, tokens=checkpointed.tokens, checkpointing=True)
    return [*out, (f"{short} --lora 16", lighter)]


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
