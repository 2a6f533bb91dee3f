"""How two models' insides compare, from what `compress.runtime.watch` saw of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from compress.runtime.watch import Observed
from evaluators.results import BlockError, BlockInternals


@dataclass(frozen=True, kw_only=True)
class Inside:
    """What the two models' insides told, and notes on what they did not."""

    errors: list[BlockError] = field(default_factory=list)
    internals: list[BlockInternals] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare_inside(reference: Observed | None, candidate: Observed | None) -> Inside:
    """None stands for a model that shows no hidden states, or whose depth is not the other's."""
    if reference is None or candidate is None:
        missing = "one of the models shows no hidden states, or has another depth"
        return Inside(notes=[f"error by depth is not available: {missing}"])
    notes = []
    if not any(candidate.entropy):
        notes.append("attention entropy is not available: this architecture's attention is not seen")
    same_width = reference.hidden[0].shape == candidate.hidden[0].shape
    if not same_width:
        notes.append("error by depth is not available: the models' hidden sizes differ")
    errors = block_errors(reference, candidate) if same_width else []
    return Inside(errors=errors, internals=block_internals(reference, candidate), notes=notes)


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
