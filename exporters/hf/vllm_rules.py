"""What vLLM demands of a quantized folder, checked without vLLM.

From its source: `layers/quantization/awq_marlin.py` (keys, fallback by layer), `utils/marlin_utils.py` (group sizes,
shapes), `utils/quant_utils.py` (`is_layer_skipped`: a fused layer's parts are all quantized or none).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError, UnsupportedError
from compress.formats import Stored, awq_gemm, compressed_tensors
from exporters.hf import vllm_int8

REQUIRED = ("quant_method", "bits", "group_size", "zero_point")
MARLIN_GROUP_SIZES = (-1, 32, 64, 128)
# vLLM's models compute these as one matrix each.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def check(folder: Stored, sm: str | None = None) -> list[str]:
    """Notes on what vLLM will do with the folder. sm: the target's compute capability, None for a CPU.

    Raises ArtifactError for a folder that vLLM would not load, and UnsupportedError, with the way out, for one that it
    cannot compute.
    """
    if folder.format is compressed_tensors:
        return vllm_int8.check(folder, sm)
    if folder.format is not awq_gemm:
        return []
    checkpoint = folder.checkpoint
    config = checkpoint.config["quantization_config"]
    missing = [key for key in REQUIRED if config.get(key) is None]
    if missing:
        raise ArtifactError(
            f"{checkpoint.path}: quantization_config has no {missing[0]}, without which vLLM does not read it as AWQ; "
            "quantize the model again"
        )
    dense = [n.removesuffix(".weight") for n in checkpoint.names() if n.endswith(".weight")]
    _same_in_fused(checkpoint, folder.layers, dense)
    _skipped_by_substring(checkpoint, folder.layers, config.get("modules_to_not_convert") or [])
    return _kernels(folder, config)


def _same_in_fused(checkpoint: Checkpoint, quantized: Sequence[str], dense: Sequence[str]) -> None:
    known = {**dict.fromkeys(dense, False), **dict.fromkeys(quantized, True)}
    for name in quantized:
        prefix, _, leaf = name.rpartition(".")
        group = next((g for g in FUSED if leaf in g), ())
        apart = [other for other in group if known.get(f"{prefix}.{other}") is False]
        if apart:
            raise UnsupportedError(
                f"{checkpoint.path}: {name} is quantized and {prefix}.{apart[0]} is not, but vLLM computes them as one "
                f"matrix; quantize again with --skip for all of {', '.join(group)}, or for none"
            )


def _skipped_by_substring(checkpoint: Checkpoint, quantized: Sequence[str], skipped: Sequence[str]) -> None:
    """vLLM skips every layer whose name contains an entry of modules_to_not_convert."""
    for entry in skipped:
        hit = next((name for name in quantized if entry in name), None)
        if hit:
            raise ArtifactError(
                f"{checkpoint.path}: modules_to_not_convert names {entry!r}, so vLLM would not read the quantized "
                f"layer {hit}; quantize the model again"
            )


def _kernels(folder: Stored, config: Mapping[str, Any]) -> list[str]:
    if config["group_size"] not in MARLIN_GROUP_SIZES:
        return [f"vLLM: group_size {config['group_size']} is not Marlin's, so every layer uses the slower AWQ kernel"]
    slow = []
    for name in folder.layers:
        out_features, in_features = folder.shape(name)
        if in_features % 128 or out_features % 64:
            slow.append(name)
    if slow:
        return [
            f"vLLM: {len(slow)} of {len(folder.layers)} layers have shapes that Marlin does not take (such as "
            f"{slow[0]}) and use the slower AWQ kernel"
        ]
    return []
