"""llm-compressor 0.14 at INT8: round-to-nearest, SmoothQuant, GPTQ, SmoothQuant and GPTQ; judged inside itself.

    run_int8_llmcompressor.py MODEL IDS.npy EVAL.npz --method METHOD [--static] [--device cuda]

The last line of stdout is a JSON object: seconds and CPU seconds of quantizing, peak memory, what `inside.judge` found.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from pathlib import Path
from typing import Any

import dense
import inside
from run_llmcompressor import quantize, tokenizer

METHODS = ("w8a16", "w8a8", "gptq", "smoothquant", "smoothquant+gptq")
STRENGTH = 0.8  # of its published INT8 examples


def recipe(method: str, static: bool) -> list[Any]:
    """The modifiers of a method, for every linear layer but the head."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    weights = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    inputs = None
    if method != "w8a16":
        how = {"strategy": "tensor", "dynamic": False} if static else {"strategy": "token", "dynamic": True}
        inputs = QuantizationArgs(num_bits=8, type="int", symmetric=True, **how)
    scheme = {
        "config_groups": {"all": QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)},
        "ignore": ["lm_head"],
    }
    modifiers: list[Any] = []
    if method.startswith("smoothquant"):
        modifiers.append(SmoothQuantModifier(smoothing_strength=STRENGTH))
    modifiers.append(GPTQModifier(**scheme) if method.endswith("gptq") else QuantizationModifier(**scheme))
    return modifiers


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--method", choices=METHODS, default=METHODS[-1])
    parser.add_argument("--static", action="store_true", help="one calibrated range of inputs a layer")
    parser.add_argument(
        "--device", default="cpu", help="where it is judged; it takes a GPU to quantize if there is one"
    )
    options = parser.parse_args()

    import torch

    torch.manual_seed(0)
    model = dense.load(options.model, torch.float32)
    modifiers = recipe(options.method, options.static)
    rows, encode = dense.rows(options.ids), tokenizer(options.model)
    clock, started = dense.Clock(), time.process_time()
    quantize(model, encode, rows, modifiers)
    spent = time.process_time() - started
    said: dict[str, Any] = {**clock.stop(), "cpu_seconds": spent}
    quantizers = sum(getattr(m, "quantization_scheme", None) is not None for m in model.modules())
    if not quantizers:
        raise SystemExit("no layer carries a quantization scheme: nothing would be judged")
    model.to(options.device)
    original = dense.load(options.model, torch.float32).to(options.device)
    version = importlib.metadata.version("llmcompressor")
    judged = inside.judge(model, original, options.texts)
    dense.report(tool="llmcompressor", version=version, layers=quantizers, judged=judged, **said)


if __name__ == "__main__":
    main()
