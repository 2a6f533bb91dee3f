"""Our artifact, read from the published layout in numpy: none of our code stands between file and figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# Nibble i of a word holds column 8c + GEMM_ORDER[i] (AutoAWQ 0.2.9, awq/utils/packing_utils.py). Restated,
# not imported: a shared constant would make packer and checker wrong together.
GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GEMM_PARTS = ("qweight", "qzeros", "scales")


def unpack_gemm(words: np.ndarray) -> np.ndarray:
    """int32 `[R, C]` into the codes 0..15 `[R, 8 C]` that AutoAWQ's gemm layout holds; uint8."""
    import numpy as np

    bits = words.astype(np.uint32)
    out = np.empty((*words.shape, 8), np.uint8)
    for nibble, column in enumerate(GEMM_ORDER):
        out[:, :, column] = (bits >> np.uint32(4 * nibble)) & np.uint32(15)
    return out.reshape(words.shape[0], -1)


def dequantize_gemm(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, group: int) -> np.ndarray:
    """The float32 weight `[out, in]` of a gemm layer: `(code - zero) * scale`, transposed."""
    import numpy as np

    codes, zeros = unpack_gemm(qweight).astype(np.float32), unpack_gemm(qzeros).astype(np.float32)
    row = np.arange(codes.shape[0]) // group
    return np.ascontiguousarray(((codes - zeros[row]) * scales.astype(np.float32)[row]).T)


def write_dense(folder: Path, out: Path) -> None:
    """Turn an AutoAWQ gemm folder into a dense float32 one (config and weights, no tokenizer)."""
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    quantized = config.pop("quantization_config")
    if (quantized["quant_method"], quantized["version"], quantized["bits"]) != ("awq", "gemm", 4):
        raise ValueError(f"{folder}: not a 4-bit AutoAWQ gemm folder: {quantized}")
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    layers = [name for name in tensors if name.endswith(".qweight")]
    for layer in (name.removesuffix(".qweight") for name in layers):
        qweight, qzeros, scales = (tensors.pop(f"{layer}.{part}").numpy() for part in GEMM_PARTS)
        weight = dequantize_gemm(qweight, qzeros, scales, quantized["group_size"])
        tensors[f"{layer}.weight"] = torch.from_numpy(weight)
    if not layers:
        raise ValueError(f"{folder}: no layer is quantized")
    out.mkdir(parents=True)
    dense = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    save_file(dense, out / "model.safetensors", {"format": "pt"})
    config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config))


def calibration_sha256(folder: Path) -> str:
    """The hash of the calibration ids that our manifest in `folder` names."""
    lineage = json.loads((folder / "compress.json").read_text())["lineage"]
    return str(lineage[-1]["calibration"]["sha256"])
