"""What goes on inside a block while it runs: hidden states, attention entropy by head, activations in the MLP.

A `TorchFunctionMode` sees the calls of attention and softmax that the block makes anyway, so no architecture needs code
of its own, and nothing is computed twice but the attention weights of the few watched sequences.

Shapes: B batch, A heads, Q queries, K keys, H hidden size
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compress.linear import linears, weight_OI

ACTIVATION_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)
WATCHED_TOKENS = 2048
# Of one model at least; above that, an eighth of what its weights take.
WATCHED_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Observed:
    """By block: its name, the watched tokens' hidden states `[tokens, H]`, entropies and activation quantiles."""

    names: list[str]
    hidden: list[Tensor]
    entropy: list[list[float]]
    activations: list[list[float]]


@dataclass(kw_only=True)
class _Block:
    hidden: list[Tensor] = field(default_factory=list)
    entropy: list[Tensor] = field(default_factory=list)
    magnitudes: list[Tensor] = field(default_factory=list)


class Watch:
    """Collects while blocks run: `block` around each run, `hidden` with its output, `next_block` when it is done."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._done: list[tuple[Tensor, list[float], list[float]]] = []
        self._now = _Block()

    @contextmanager
    def block(self, module: nn.Module) -> Iterator[None]:
        def magnitude(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._now.magnitudes.append(args[0].detach().abs().float().flatten().cpu())

        handle = _last_linear(module).register_forward_pre_hook(magnitude)
        try:
            with _Attention(self._now.entropy):
                yield
        finally:
            handle.remove()

    def hidden(self, hidden: Tensor) -> None:
        self._now.hidden.append(hidden.float().flatten(0, 1).cpu())

    def next_block(self, name: str) -> None:
        now = self._now
        heads = {len(e) for e in now.entropy}
        entropy = torch.stack(now.entropy).mean(0).tolist() if len(heads) == 1 else []
        values = torch.cat(now.magnitudes).numpy()
        self._done.append((torch.cat(now.hidden), entropy, np.quantile(values, ACTIVATION_QUANTILES).tolist()))
        self._names.append(name)
        self._now = _Block()

    def observed(self) -> Observed | None:
        if not self._done:
            return None
        hidden, entropy, activations = zip(*self._done, strict=True)
        return Observed(names=self._names, hidden=list(hidden), entropy=list(entropy), activations=list(activations))


def watchable(num_blocks: int, hidden_size: int, lengths: Sequence[int], weight_bytes: int = 0) -> int:
    """How many of the first sequences to watch: of one length, few tokens, and bounded memory over all blocks."""
    most = min(WATCHED_TOKENS, max(WATCHED_BYTES, weight_bytes // 8) // (4 * num_blocks * hidden_size))
    same = next((i for i, n in enumerate(lengths) if n != lengths[0]), len(lengths))
    return min(same, max(1, most // lengths[0])) if lengths else 0


class _Attention(TorchFunctionMode):
    """Notes the entropy `[A]` of every attention that is computed inside, by fused attention or by a softmax."""

    def __init__(self, out: list[Tensor]) -> None:
        super().__init__()
        self.out = out

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        result = func(*args, **kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.out.append(_entropy_of_call(*args, **kwargs))
        elif func is torch.nn.functional.softmax and isinstance(result, Tensor) and result.ndim == 4:
            self.out.append(_entropy(result.float()).mean((0, 2)).cpu())
        return result


def _entropy_of_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Entropy `[A]` of the weights that this call of fused attention uses; one head of one sequence at a time."""
    num_heads, num_queries = query.shape[1], query.shape[2]
    shared = num_heads // key.shape[1]
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    out = torch.zeros(num_heads)
    mask = None if attn_mask is None else attn_mask.expand(query.shape[0], num_heads, num_queries, key.shape[2])
    causal = torch.ones(num_queries, key.shape[2], dtype=torch.bool, device=query.device).tril() if is_causal else None
    for b in range(query.shape[0]):
        for a in range(num_heads):
            score_QK = (query[b, a].float() @ key[b, a // shared].float().t()) * factor
            if causal is not None:
                score_QK.masked_fill_(~causal, -torch.inf)
            if mask is not None:
                own = mask[b, a]
                score_QK = score_QK.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else score_QK + own
            out[a] += _entropy(score_QK.softmax(-1)).mean().cpu() / query.shape[0]
    return out


def _entropy(weights: Tensor) -> Tensor:
    entropy: Tensor = -torch.special.xlogy(weights, weights).sum(-1)
    return entropy


def _last_linear(block: nn.Module) -> nn.Module:
    """The linear with the widest input, the last of them if several: the MLP's down projection."""
    return max(enumerate(linears(block).values()), key=lambda pair: (weight_OI(pair[1]).shape[1], pair[0]))[1]
