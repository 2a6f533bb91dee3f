"""The numbers that an export must reproduce: the artifact's own forward, block by block, in float32.

Shapes: T tokens, V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress import activations
from compress.errors import ArtifactError
from compress.model import StreamedModel

PREFILL = 16
DECODE = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """Token ids `[T]` (int64) and the artifact's float32 logits `[T, V]`; the first `prefill` tokens enter at once."""

    ids_T: Tensor
    logits_TV: Tensor
    prefill: int = PREFILL


def of_artifact(artifact: Path, *, prefill: int = PREFILL, decode: int = DECODE, plain: bool = False) -> Reference:
    """Logits of `prefill + decode` fixed pseudo-random tokens, read one block at a time, with a KV cache of floats, as
    graphs have it.

    Random tokens reach further into the vocabulary and drive larger activations than text does, so they show a wrong
    weight sooner. Deterministic. plain: without quantizing any inputs, whatever the artifact says.
    """
    model = StreamedModel.open(artifact, dtype=torch.float32)
    model.kv = None
    generator = torch.Generator().manual_seed(2306)
    ids_T = torch.randint(0, model.vocab_size, (prefill + decode,), generator=generator)
    with torch.no_grad():
        hidden = model.embed(ids_T[None])
        for index in range(model.num_blocks):
            block = model.load_block(index)
            for module in block.modules() if plain else ():
                activations.uninstall(module)
            hidden = model.run_block(index, hidden)
            model.release_block(index)
        logits = model.head(hidden)[0].float()
    return Reference(ids_T=ids_T, logits_TV=logits, prefill=prefill)


def input_noise(artifact: Path, reference: Reference) -> float:
    """How far quantizing inputs moves the artifact's logits, relative; 0 where it quantizes none.

    No two implementations agree on such a model's logits to less than that order: a value within float32's noise of the
    middle between two codes takes the one or the other, that step makes other values fall otherwise, and after some
    layers the two roundings are as good as independent (the difference then is up to 1.4 times this).
    """
    if all(scheme.input is None for scheme in StreamedModel.open(artifact).stored.plan.groups()):
        return 0.0
    exact = of_artifact(
        artifact, prefill=reference.prefill, decode=len(reference.ids_T) - reference.prefill, plain=True
    )
    return float((exact.logits_TV - reference.logits_TV).double().norm() / exact.logits_TV.double().norm())


def compare(found_TV: Tensor, reference: Reference, *, tolerance: float, what: str) -> dict[str, float]:
    """Relative error `|found - reference| / |reference|` (Frobenius), and the share of equal top tokens.

    Returns both for the manifest. Raises ArtifactError when the error exceeds `tolerance` or anything is not finite.
    """
    wanted = reference.logits_TV
    if tuple(found_TV.shape) != tuple(wanted.shape):
        raise ArtifactError(
            f"{what}: logits of shape {tuple(found_TV.shape)}, the artifact's are {tuple(wanted.shape)}"
        )
    error = float((found_TV.double() - wanted.double()).norm() / wanted.double().norm())
    same = float((found_TV.argmax(-1) == wanted.argmax(-1)).double().mean())
    if not error <= tolerance:
        raise ArtifactError(
            f"{what}: its logits differ from the artifact's by {error:.2e} (relative), more than {tolerance:.0e}; "
            "the export is wrong and was not kept"
        )
    return {"tolerance": tolerance, "relative_error": float(f"{error:.3e}"), "same_top_token": round(same, 4)}
