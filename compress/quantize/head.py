"""The output matrix in integers: lm_head, where it is a tensor of its own.

It is one linear behind the blocks. Its rows are rounded with error feedback on the Gram matrix of what the final norm
gives in the original model, and their scales refitted, as `balanced` does with a linear of a block; nothing is folded
into the norm, so float16 stays what it was. Rows go through in parts: a vocabulary of 128k rows is gigabytes.

An output matrix that is the input embedding stays as it is, and so do embeddings: vLLM has packed embeddings for models
that hand them a name, which Llama's does not, and none that are tied (PR 44340; PR 45535 is open), transformers 5.23
fails to load them.

Shapes: V vocabulary, H hidden size
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compress import numerics
from compress.block import BlockResult
from compress.errors import UnsupportedError
from compress.model import StreamedModel
from compress.plan import LayerPlan
from compress.quantize import awq
from compress.quantize.damage import refuse_damage, refuse_drowning, relative_error
from compress.quantize.feedback import Prepared, Rounded, prepare, round_with_feedback
from compress.quantize.refit import refit_scales
from compress.quantized import QuantizedWeight
from compress.scheme import Scheme
from compress.statistics import InputStatistics, kept_share

# Rows of the matrix that are read and rounded at once.
_ROWS = 16384
# Which readers take it, as far as their own changes say; none of them was run here.
READERS = {
    "vllm": "pull request 37291, merged in March 2026, or later",
    "sglang": "pull request 35228, merged in August 2026, or later; before, it answers garbage without an error",
    "transformers": "with compressed-tensors 0.20, where no INT4 has zero points",
}


def head_of(model: StreamedModel) -> str:
    """The name of the output matrix that may be chosen for; UnsupportedError where there is none of its own."""
    name = model.own_head()
    if name is None:
        raise UnsupportedError(
            f"--lm-head: the output matrix of {model.checkpoint.path.name} is its input embedding, which no reader "
            "takes in integers; leave --lm-head out"
        )
    return name


def head_statistics(model: StreamedModel, hidden: Sequence[Tensor]) -> InputStatistics:
    """Of what the output matrix multiplies. hidden: the original model's final hidden states, batch by batch."""
    statistics = InputStatistics.empty(hidden[0].shape[-1], model.device)
    with model.head_loaded():
        for batch in hidden:
            statistics.add(model.head_input(batch).flatten(0, 1))
    statistics.finish()
    return statistics


def rounded(w_OI: Tensor, inputs: Prepared, gram_II: Tensor, scheme: Scheme) -> Rounded:
    """Rows of a linear, rounded with error feedback, their scales refitted."""
    made = round_with_feedback(w_OI, inputs, scheme, wanted=False)
    return replace(made, scale_OG=refit_scales(made, w_OI, gram_II, scheme, inputs.off_diagonal))


def quantize_head(
    model: StreamedModel, hidden: Sequence[Tensor], plan: LayerPlan, *, allow_damage: bool = False
) -> BlockResult:
    """The output matrix in the plan's scheme, under its full name, with a report as of a block's layers."""
    name = head_of(model)
    scheme = plan[name].weight
    assert scheme is not None
    statistics = head_statistics(model, hidden)
    gram_II = statistics.gram_II
    inputs = prepare(gram_II, scheme, kept_share(len(gram_II), statistics.num_tokens))
    rows = model.checkpoint.info(f"{name}.weight").shape[0]
    parts: list[Rounded] = []
    signal = error = to_nearest = 0.0
    for start in range(0, rows, _ROWS):
        stored = model.checkpoint.slice(f"{name}.weight", start, min(start + _ROWS, rows))
        w_OI = stored.to(model.device, torch.float32)
        if not allow_damage:
            refuse_drowning(name, w_OI)
        parts.append(rounded(w_OI, inputs, gram_II, scheme))
        signal += awq.output_error(w_OI, gram_II)
        error += awq.output_error(parts[-1].dequantize(scheme).sub_(w_OI), gram_II)
        to_nearest += awq.output_error(numerics.round_to_nearest(w_OI, scheme).sub_(w_OI), gram_II)
    told = {"error": relative_error(error, signal, name), "rtn_error": relative_error(to_nearest, signal, name)}
    if not allow_damage:
        refuse_damage(name, told["error"], told["rtn_error"])
    made = QuantizedWeight.from_parts(
        torch.cat([part.codes_OI for part in parts]),
        torch.cat([part.scale_OG for part in parts]),
        torch.cat([part.zero_point_OG for part in parts]),
        scheme,
    )
    clip = round(numerics.mean_of(torch.cat([part.factor_OG for part in parts])), 4)
    report: dict[str, Any] = {"layers": [{"layer": name, **told, "ratio": 0.0, "clip": clip}], "groups": []}
    return BlockResult(quantized={name: made}, dense={}, report=report)
