"""llm-compressor 0.14: round-to-nearest, AWQ, GPTQ, and GPTQ after AWQ.

On a machine without an accelerator its AWQ fails, because it pins host memory; pinning is switched off there.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import dense

METHODS = ("rtn", "awq", "gptq", "awq+gptq")


def recipe(method: str, bits: int, group_size: int, symmetric: bool) -> list[Any]:
    """The modifiers of a method, for every linear layer but the head."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=group_size)
    scheme = {
        "config_groups": {"all": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }
    modifiers: list[Any] = []
    if method.startswith("awq"):
        from llmcompressor.modifiers.transform.awq import AWQModifier

        modifiers.append(AWQModifier(duo_scaling=True, n_grid=20))
    modifiers.append(GPTQModifier(**scheme) if method.endswith("gptq") else QuantizationModifier(**scheme))
    return modifiers


def quantize(model: Any, tokenizer: Any, rows: list[list[int]], modifiers: list[Any]) -> None:
    """Run the recipe on the model, in place."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_, **__: None
    samples = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=samples,
        recipe=modifiers,
        max_seq_length=len(rows[0]),
        num_calibration_samples=len(rows),
    )


def dequantized(model: Any) -> dict[str, Any]:
    """Every parameter, and for quantized layers the weight that their scales and zero points stand for."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    tensors = dict(model.named_parameters())
    for name, layer in model.named_modules():
        scheme = getattr(layer, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            zero_point = getattr(layer, "weight_zero_point", None)
            tensors[f"{name}.weight"] = fake_quantize(
                layer.weight.data, layer.weight_scale.data, zero_point, scheme.weights
            )
    return tensors


def tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def main() -> None:
    parser = dense.parser(__doc__, METHODS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--packed", action="store_true", help="OUT becomes its own compressed format, not a dense copy")
    options = parser.parse_args()

    import torch

    torch.manual_seed(0)
    loading = dense.Clock()
    model = dense.load(options.model, getattr(torch, options.dtype))  # it moves blocks to a GPU itself, if there is one
    load_seconds = loading.stop()["quant_seconds"]
    modifiers = recipe(options.method, options.bits, options.group_size, options.sym)
    rows, encode = dense.rows(options.ids), tokenizer(options.model)
    clock = dense.Clock()
    quantize(model, encode, rows, modifiers)
    said: dict[str, Any] = clock.stop()
    said |= {"load_seconds": load_seconds, "gpu_allocated_mib": gpu_mib()}
    if options.packed:
        saving = dense.Clock()
        model.save_pretrained(options.out, save_compressed=True)
        said["save_seconds"] = saving.stop()["quant_seconds"]
    else:
        said |= dense.write(options.model, options.out, dequantized(model))
    dense.report(tool="llmcompressor", version=importlib.metadata.version("llmcompressor"), **said)


def gpu_mib() -> float | None:
    """The most that torch had allocated on the GPU; None without one."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None


if __name__ == "__main__":
    main()
