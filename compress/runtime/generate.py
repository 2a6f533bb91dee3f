"""Text from any decoder: the next token picked greedily or drawn, until an end of text, a limit or the cache's end.

Shapes: V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import ConfigError
from compress.runtime.runner import Decoder


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0: the likeliest token. Else drawn from the top_k likeliest (0: all), cut down to the fewest whose
    probabilities reach top_p."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}: temperature and top_k are "
                "at least 0, top_p is above 0 and at most 1"
            )


def pick(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token's id."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    values, order = logits_V.float().cpu().sort(descending=True, stable=True)
    if sampling.top_k:
        values, order = values[: sampling.top_k], order[: sampling.top_k]
    probabilities = (values.double() / sampling.temperature).softmax(0)
    keep = int((probabilities.cumsum(0) < sampling.top_p).sum()) + 1
    drawn = torch.multinomial(probabilities[:keep], 1, generator=generator)
    return int(order[drawn])


def generate(
    decoder: Decoder, prompt: Sequence[int], *, limit: int, eos: frozenset[int] = frozenset(), sampling: Sampling
) -> Iterator[int]:
    """Ids one by one, at most `limit`; an end-of-text id ends the text and is not given.

    ConfigError for an empty prompt or one that leaves the cache no room.
    """
    if not prompt:
        raise ConfigError("the prompt has no tokens; pass some text")
    if len(prompt) >= decoder.capacity:
        raise ConfigError(
            f"the prompt has {len(prompt)} tokens and the cache holds {decoder.capacity}; pass a shorter one"
        )
    generator = torch.Generator().manual_seed(sampling.seed)
    logits = decoder.prefill(torch.tensor([list(prompt)]))
    for made in range(1, limit + 1):
        token = pick(logits[0], sampling, generator)
        if token in eos:
            return
        yield token
        if made == limit or len(prompt) + made >= decoder.capacity:
            return
        logits = decoder.step(torch.tensor([token]))
