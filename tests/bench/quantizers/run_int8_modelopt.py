"""NVIDIA ModelOpt 0.47 at INT8: its SmoothQuant, or ranges alone, inputs with one range a layer; judged inside itself.

    run_int8_modelopt.py MODEL IDS.npy EVAL.npz --method smoothquant|max [--device cuda]

It quantizes inputs by tensor only: what TensorRT's Q/DQ graphs compute. Output as `run_int8_llmcompressor.py`.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import time
from pathlib import Path
from typing import Any

import dense
import inside

METHODS = {"smoothquant": "INT8_SMOOTHQUANT_CFG", "max": "INT8_DEFAULT_CFG"}
BATCH = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--method", choices=METHODS, default="smoothquant")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    import modelopt.torch.quantization as mtq
    import torch

    torch.manual_seed(0)
    model = dense.load(options.model, torch.float32).to(options.device)
    ids_NT = torch.tensor(dense.rows(options.ids), device=options.device)

    def calibrate(loaded: Any) -> None:
        with torch.no_grad():
            for batch_BT in ids_NT.split(BATCH):
                loaded(batch_BT, use_cache=False)

    clock, started = dense.Clock(), time.process_time()
    mtq.quantize(model, copy.deepcopy(getattr(mtq, METHODS[options.method])), calibrate)
    spent = time.process_time() - started
    said: dict[str, Any] = {**clock.stop(), "cpu_seconds": spent}
    enabled = sum(getattr(getattr(m, "input_quantizer", None), "is_enabled", False) for m in model.modules())
    if not enabled:
        raise SystemExit("no layer quantizes its inputs: nothing would be judged")
    original = dense.load(options.model, torch.float32).to(options.device)
    version = importlib.metadata.version("nvidia-modelopt")
    dense.report(
        tool="modelopt", version=version, layers=enabled, judged=inside.judge(model, original, options.texts), **said
    )


if __name__ == "__main__":
    main()
