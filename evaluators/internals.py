"""How two models' insides compare, from what `compress.runtime.watch` saw of each."""

from __future__ import annotations

import math

from compress.runtime.watch import Observed
from evaluators.results import BlockError, BlockInternals


def block_errors(reference: Observed, candidate: Observed) -> list[BlockError]:
    """Where the error enters: distance of the two models' hidden states after each block."""
    out = []
    for index, (name, r, c) in enumerate(zip(candidate.names, reference.hidden, candidate.hidden, strict=True)):
        mse = float((c - r).double().square().mean())
        power = float(r.double().square().mean())
        snr = 10 * math.log10(power / mse) if mse > 0 and power > 0 else None
        out.append(BlockError(index=index, name=name, mse=mse, snr_db=snr))
    return out


def block_internals(reference: Observed, candidate: Observed) -> list[BlockInternals]:
    """Both models' entropies and activations, block by block."""
    return [
        BlockInternals(
            index=index,
            name=name,
            entropy_reference=reference.entropy[index],
            entropy_candidate=candidate.entropy[index],
            activations_reference=reference.activations[index],
            activations_candidate=candidate.activations[index],
        )
        for index, name in enumerate(candidate.names)
    ]
