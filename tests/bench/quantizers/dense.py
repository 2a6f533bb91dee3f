"""What a rival is given and what it hands back: token ids in, a dense folder out, the cost on stdout.

Each `run_*.py` beside this file runs one quantizer in that quantizer's own environment:

    run_NAME.py MODEL OUT IDS.npy --method METHOD [--bits 4 --group-size 128 --sym ...]

IDS.npy is int64 [N, T], the calibration rows, the same file for every quantizer. OUT becomes a dense float32 copy
of MODEL whose weights are the quantized ones, with smoothing folded in, so that one evaluator measures all of them
alike. The last line of stdout is a JSON object, see `Clock.stop` and `write`.

Only torch, numpy and safetensors are used here: the environments hold different versions of everything else.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def parser(description: str | None, methods: tuple[str, ...]) -> argparse.ArgumentParser:
    """The arguments that all quantizers share."""
    out = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    out.add_argument("model", type=Path)
    out.add_argument("out", type=Path)
    out.add_argument("ids", type=Path)
    out.add_argument("--method", choices=methods, default=methods[0])
    out.add_argument("--bits", type=int, default=4)
    out.add_argument("--group-size", type=int, default=128)
    out.add_argument("--sym", action="store_true")
    out.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    return out


def rows(path: Path) -> list[list[int]]:
    """The calibration rows, each a list of token ids."""
    ids_NT = np.load(path)
    if ids_NT.ndim != 2 or ids_NT.dtype != np.int64:
        raise SystemExit(f"{path} holds {ids_NT.dtype} {list(ids_NT.shape)}, not int64 [rows, tokens]")
    return [[int(i) for i in row] for row in ids_NT]


def load(model: Path, dtype: Any) -> Any:
    """The model in `model`, ready to be quantized."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()


class Clock:
    """Wall time from its making on; CPU time and memory of the whole process, so call `stop` before anything else."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._started
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "quant_seconds": seconds,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_rss_mib": usage.ru_maxrss / 1024,
        }


def write(model: Path, out: Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Write the tensors of `model` with those in `tensors` put in their place, all as float32.

    `tensors` may hold more than the model does (scales, say); a missing one keeps its value. Returns how many
    matrices changed and by how much, as a share of their norm. A run that changed none is an error.
    """
    import torch
    from safetensors.torch import load_file, save_file

    dense: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        dense |= load_file(file)
    changed, error, total = 0, 0.0, 0.0
    for name, old in dense.items():
        old = old.float()
        new = tensors[name].detach().to("cpu", torch.float32) if name in tensors else old
        if new.shape != old.shape:
            raise SystemExit(f"{name} has the shape {list(new.shape)} after quantization, {list(old.shape)} before")
        if old.dim() == 2 and not torch.equal(new, old):
            changed += 1
            error += float((new - old).double().pow(2).sum())
            total += float(old.double().pow(2).sum())
        dense[name] = new.clone().contiguous()
    if not changed:
        raise SystemExit("no matrix differs from the original: nothing was quantized")
    out.mkdir(parents=True)
    save_file(dense, out / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (model / name).exists():
            shutil.copyfile(model / name, out / name)
    return {"changed_matrices": changed, "relative_change": (error / total) ** 0.5}


def report(**said: Any) -> None:
    """The last line of stdout."""
    print(json.dumps(said), flush=True)
