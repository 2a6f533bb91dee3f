"""Which units of a width go: those whose loss, once the others have made up for it as well as they can, is least.

Removing input channels R of a linear W and refitting the rest on the Gram matrix H of the inputs costs

    tr(W_R (H^-1_RR)^-1 W_R^T)

of output error (the "optimal brain surgeon", Hassibi and Stork 1993), so a channel that others can stand in for is
cheap however active it is. Units go a few at a time, and W and H^-1 are brought up to date after each round, so that
of two that stand in for each other only one goes. Without the inverse the score would be `|W_j|^2 H_jj`, which is what
the error would be if nothing were refitted; hidden channels, which many linears read and write, go by their share of
the hidden state's energy.

Shapes: O out_features, I in_features, U units, H hidden size, P pieces, R input channels of a piece
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rounds in which neurons go: enough that a round is a small part of what is left.
ROUNDS = 16


def kept_neurons(w_OI: Tensor, inverse_II: Tensor, keep: int, rounds: int = ROUNDS) -> tuple[Tensor, Tensor]:
    """The `keep` input channels to keep, ascending (int64), and what each channel would have cost alone `[I]`.

    w_OI: float32. inverse_II: the inverse of the inputs' Gram matrix, shrunk and damped; float32, not changed.
    """
    alone_I = w_OI.square().sum(0) / inverse_II.diagonal()
    left = torch.arange(w_OI.shape[1], device=w_OI.device)
    remove = len(left) - keep
    w, inverse = w_OI, inverse_II
    for turn in range(rounds):
        count = remove * (turn + 1) // rounds - remove * turn // rounds
        if not count:
            continue
        cost = w.square().sum(0) / inverse.diagonal()
        gone = torch.zeros(len(left), dtype=torch.bool, device=left.device)
        gone[torch.sort(cost, stable=True).indices[:count]] = True
        w, inverse = without(w, inverse, gone)
        left = left[~gone]
    return left.cpu(), alone_I


def kept_pieces(
    w_OI: Tensor, inverse_II: Tensor, pieces: list[Tensor], keep: int, group: list[int] | None = None
) -> tuple[list[int], list[float]]:
    """The `keep` pieces (sets of as many input channels each, int64) to keep, ascending; what each had cost alone.

    group: with it, as many go from each group as from any other; `keep` is then a multiple of the groups. One at a
    time, so it is meant for heads, not for neurons.
    """
    left = list(range(len(pieces)))
    where = [p.to(w_OI.device) for p in pieces]  # of each piece that is left, its channels now
    w, inverse = w_OI, inverse_II
    costs = alone = _costs(w, inverse, where)
    quota = None if group is None else keep // len(set(group))
    while len(left) > keep:
        held = [group[u] for u in left] if group is not None else []
        may = [k for k in range(len(left)) if quota is None or held.count(held[k]) > quota]
        best = min(may, key=lambda k: (costs[k], k))
        gone = torch.zeros(w.shape[1], dtype=torch.bool, device=w.device)
        gone[where[best]] = True
        w, inverse = without(w, inverse, gone)
        place = torch.cumsum(~gone, 0) - 1
        del left[best], where[best]
        where = [place[p] for p in where]
        costs = _costs(w, inverse, where) if len(left) > keep else []
    return left, alone


def _costs(w_OI: Tensor, inverse_II: Tensor, pieces: list[Tensor]) -> list[float]:
    """Output error that removing each piece's channels leaves after refitting the others; read off once for all."""
    piece_PR = torch.stack(pieces)
    w_PRO = w_OI.t()[piece_PR].double()
    inverse_PRR = inverse_II[piece_PR.unsqueeze(2), piece_PR.unsqueeze(1)].double()
    costs: list[float] = (torch.linalg.solve(inverse_PRR, w_PRO) * w_PRO).sum((1, 2)).tolist()
    return costs


def without(w_OI: Tensor, inverse_II: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """W refitted without the channels `gone` (bool `[I]`), and the inverse of the smaller Gram matrix."""
    stay = ~gone
    cross_RK = inverse_II[gone][:, stay]
    solved_RK = torch.linalg.solve(inverse_II[gone][:, gone], cross_RK)
    smaller_KK = inverse_II[stay][:, stay].addmm_(cross_RK.t(), solved_RK, alpha=-1)
    return w_OI[:, stay].addmm_(w_OI[:, gone], solved_RK, alpha=-1), smaller_KK


def kept_channels(energy_H: Tensor, keep: int) -> Tensor:
    """The `keep` hidden channels of most energy, ascending; int64. energy_H: summed over blocks and tokens."""
    return torch.sort(energy_H, descending=True, stable=True).indices[:keep].sort().values.cpu()
