"""Keys and values as an INT8 cache holds them, put into a model's own attention.

The rule is vLLM's `int8_per_token_head`: of each token and head, `scale = max(amax / 127, 1e-6)`, codes rounded to
nearest and clamped to -128..127, keys after their rotation. Nothing is calibrated and nothing stored; what a token
leaves in the cache is all that later tokens, and the token itself, see of it. Source: vLLM, `int8_per_token_head`
kernels since pull request 45361 (before it codes were truncated).

An attention of transformers hands keys and values to `past_key_values.update` and goes on with what comes back; so an
object with that method is all that is needed, whatever the architecture.

Shapes: B batch, H key heads, T tokens, D head size
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from compress.errors import UnsupportedError
from compress.plan import KvScheme

SMALLEST_SCALE = 1e-6
# What transformers' blocks call the cache that they are given.
ARGUMENTS = ("past_key_values", "layer_past")
# Up to this version vLLM cut codes off, or mixed up the scales of hybrid models (pull requests 45361, 44455).
LAST_WRONG_VLLM = "0.25.1"


def as_cached(x_BHTD: Tensor) -> Tensor:
    """Keys or values after they were in the cache, same dtype."""
    x = x_BHTD.float()
    scale = (x.abs().amax(dim=-1, keepdim=True) / 127).clamp(min=SMALLEST_SCALE)
    return (x / scale).round_().clamp_(-128, 127).mul_(scale).to(x_BHTD.dtype)


def bytes_a_token(config: Any, itemsize: int) -> int:
    """Bytes that keys and values of one token take in all blocks, `itemsize` a number.

    config: a transformers config of the language model; without key heads or a head size of its own, as its queries'.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * itemsize)


class Int8Cache:
    """Stands where transformers' cache would, for one forward over whole sequences: rounds, and keeps nothing.

    keys, values: which of them are rounded.
    """

    def __init__(self, *, keys: bool = True, values: bool = True) -> None:
        self.keys, self.values = keys, values
        self.updates = 0

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """See `transformers.Cache.update`."""
        self.updates += 1
        return as_cached(keys) if self.keys else keys, as_cached(values) if self.values else values

    def get_seq_length(self, *_: Any) -> int:
        """Nothing is held from before."""
        return 0


def cache_of(scheme: KvScheme | None) -> Int8Cache | None:
    """The cache that a plan asks for."""
    return None if scheme is None else Int8Cache()


def growing_cache(scheme: KvScheme | None, config: Any) -> Any:
    """transformers' own cache, for generating token by token; what enters it is rounded where the plan says so."""
    from transformers import DynamicCache

    class Growing(DynamicCache):  # type: ignore[misc]
        def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            found: tuple[Tensor, Tensor] = super().update(as_cached(keys), as_cached(values), *args, **kwargs)
            return found

    return DynamicCache(config=config) if scheme is None else Growing(config=config)


def with_cache(kwargs: dict[str, Any], cache: Int8Cache, block: str) -> dict[str, Any]:
    """A block's arguments with the cache among them. UnsupportedError for a block that takes none."""
    for name in ARGUMENTS:
        if name in kwargs:
            return {**kwargs, name: cache}
    raise UnsupportedError(
        f"{block} is called without a cache ({', '.join(sorted(kwargs)) or 'no arguments'}), so an INT8 KV cache "
        "cannot be computed for it; leave --kv-cache out"
    )


def relative_errors(run: Callable[[Int8Cache | None], Tensor], hidden: Tensor) -> dict[str, float]:
    """What rounding keys, values and both costs: squared error of a block's output over what it adds to `hidden`.

    run(cache): the block's output on `hidden`.
    """
    exact = run(None)
    added = float((exact - hidden).double().square().sum())
    named = {"keys": Int8Cache(values=False), "values": Int8Cache(keys=False), "both": Int8Cache()}
    errors = {}
    for name, cache in named.items():
        lost = float((run(cache) - exact).double().square().sum())
        errors[name] = float(f"{lost / max(added, 1e-30):.6g}")
    return errors
