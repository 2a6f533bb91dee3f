"""Which hidden channels can go: those with the least share of the hidden state, over all blocks and tokens.

Every linear reads the hidden state through a norm, so what counts of a channel is its share of a token's energy, not
its size. The norm before the output matrix divides by the root mean square of the channels that stay, which is larger
than that of all, so its weight is scaled by the ratio; those inside the blocks are answered for by refitting.

Shapes: B batch, T tokens, H hidden size
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.model import StreamedModel
from compress.prune.importance import kept_channels


@dataclass(frozen=True, kw_only=True)
class Channels:
    """energy: of each hidden channel, its mean share of a token's energy, summed over blocks. scale: by how many
    channels stay, the root mean square of those over that of all, in the state that leaves the last block."""

    energy: list[float]
    scale: dict[int, float]

    def kept(self, keep: int) -> Tensor:
        """The channels that stay, ascending; int64."""
        return kept_channels(torch.tensor(self.energy, dtype=torch.float64), keep)

    def to_json(self) -> dict[str, Any]:
        return {"energy": self.energy, "scale": [[keep, scale] for keep, scale in self.scale.items()]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Channels:
        return cls(energy=list(value["energy"]), scale={int(keep): scale for keep, scale in value["scale"]})


@torch.no_grad()
def measure_channels(model: StreamedModel, ids_NT: Tensor, keep: Sequence[int], batch: int) -> Channels:
    """One pass of the original model over the rows, `batch` at once."""
    hidden = model.embed_batches(ids_NT.split(batch))
    energy_H = _shares(hidden)
    for index in range(model.num_blocks):
        model.load_block(index)
        hidden = [model.run_block(index, h) for h in hidden]
        model.release_block(index)
        energy_H += _shares(hidden)
    scale = {}
    for count in keep:
        kept = kept_channels(energy_H, count).to(hidden[0].device)
        ratios = [
            (h.float()[..., kept].square().mean(-1) / h.float().square().mean(-1).clamp(min=1e-20)).sqrt().flatten()
            for h in hidden
        ]
        scale[count] = float(torch.cat(ratios).mean())
    return Channels(energy=energy_H.tolist(), scale=scale)


def _shares(hidden: Sequence[Tensor]) -> Tensor:
    """Mean over tokens of each channel's share of the token's energy; float64 `[H]`, on the CPU."""
    total = torch.zeros(hidden[0].shape[-1], dtype=torch.float64)
    for h in hidden:
        energy = h.float().square()
        total += (energy / energy.sum(-1, keepdim=True).clamp(min=1e-20)).flatten(0, -2).sum(0).double().cpu()
    return total / sum(h.shape[0] * h.shape[1] for h in hidden)
