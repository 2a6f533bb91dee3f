"""gptqmodel 7.7: GPTQ (with a range search and activation order, `--mse 2 --act-order 1`) and AWQ.

Its result is read back from the folder that it writes. GPTQ with activation order needs an index of groups for each
input channel, which AWQ's format cannot hold. With fewer than 3 cores its loader fails, so it is told of 4.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import dense

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # column c of eight lies in nibble AWQ_ORDER[c]


def nibbles(words: Any, bits: int) -> Any:
    """int32 `[R, C]` into `[R, C, 32 / bits]`, lowest bits first."""
    import torch

    shifts = torch.arange(0, 32, bits)
    return (words[:, :, None] >> shifts) & ((1 << bits) - 1)


def dequantized(packed: dict[str, Any], layer: str, method: str, bits: int, group_size: int, is_v2: bool) -> Any:
    """The float32 weight `[out, in]` of a packed layer."""
    import torch

    qweight, qzeros, scales = (packed[f"{layer}.{part}"] for part in ("qweight", "qzeros", "scales"))
    if method == "awq":
        order = torch.tensor(AWQ_ORDER)
        codes, zeros = (nibbles(words, bits)[:, :, order].flatten(1) for words in (qweight, qzeros))
        group = torch.arange(codes.shape[0]) // group_size
    else:
        codes = nibbles(qweight.T, bits).flatten(1).T  # packed along the input channels
        zeros = nibbles(qzeros, bits).flatten(1)
        if not is_v2:  # the first format stores zero points less one
            zeros = (zeros + 1) & ((1 << bits) - 1)
        group = packed[f"{layer}.g_idx"].long()
    return ((codes - zeros[group]).float() * scales.float()[group]).T.contiguous()


def read_packed(folder: Path, method: str, bits: int, group_size: int) -> dict[str, Any]:
    """All tensors of the folder, packed layers as dense weights."""
    from safetensors.torch import load_file

    packed: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        packed |= load_file(file)
    config = json.loads((folder / "quantize_config.json").read_text())
    is_v2 = "v2" in str(config.get("checkpoint_format") or config.get("format"))
    layers = [name.removesuffix(".qweight") for name in packed if name.endswith(".qweight")]
    weights = {f"{name}.weight": dequantized(packed, name, method, bits, group_size, is_v2) for name in layers}
    return packed | weights


def main() -> None:
    parser = dense.parser(__doc__, ("gptq", "awq"))
    parser.add_argument("--mse", type=float, default=0.0)
    parser.add_argument("--act-order", type=int, choices=(0, 1), default=0)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    if (os.cpu_count() or 1) < 4:
        os.cpu_count = lambda: 4

    import torch
    from gptqmodel import GPTQModel
    from gptqmodel.quantization.config import AWQConfig, GPTQConfig

    torch.manual_seed(0)
    common: dict[str, Any] = {
        "bits": options.bits,
        "group_size": options.group_size,
        "sym": options.sym,
        "device": options.device,
        "offload_to_disk": False,
    }
    if options.method == "awq":
        config, dtype = AWQConfig(**common), torch.float16  # it refuses to pack float32
    else:
        config = GPTQConfig(desc_act=bool(options.act_order), mse=options.mse, **common)
        dtype = torch.float32
    rows = dense.rows(options.ids)
    model = GPTQModel.load(str(options.model), config, dtype=dtype)
    packed = options.out.with_name(options.out.name + "-packed")
    clock = dense.Clock()
    samples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    model.quantize(samples, batch_size=options.batch, calibration_concat_size=None)
    cost = clock.stop()
    model.save(str(packed))
    tensors = read_packed(packed, options.method, options.bits, options.group_size)
    change = dense.write(options.model, options.out, tensors)
    dense.report(tool="gptqmodel", version=importlib.metadata.version("gptqmodel"), **cost, **change)


if __name__ == "__main__":  # it starts processes of its own
    main()
