"""Known candidates before the gate: the reference model itself, bfloat16 rounding, AWQ INT4 and plain rounding to INT4.

    python tests/bench/verdicts.py --data TEXT [--tasks FILE.jsonl] [--limit N] [--max-tokens N]

Prints each one's verdict at 98 %. The model's weights are stored in float16: rounding to float16 changes nothing.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import calibration_data
from compress import numerics
from compress.linear import linears
from compress.model import StreamedModel
from compress.quantize.awq_stage import AwqRequest, quantize_awq
from compress.scheme import Scheme
from compress.workspace import resolve
from evaluators.evaluate import evaluate
from evaluators.request import EvaluationRequest


def changed(original: Path, out: Path, method: str) -> Path:
    """A copy of the model with its blocks' linears rounded."""
    shutil.copytree(original, out)
    tensors = load_file(original / "model.safetensors")
    model = StreamedModel.open(original)
    for index, block in enumerate(model.blocks):
        for name in linears(block):
            key = f"{model.block_prefix(index)}{name}.weight"
            if method == "bfloat16":
                tensors[key] = tensors[key].to(torch.bfloat16).float()
            else:
                tensors[key] = numerics.round_to_nearest(tensors[key].float(), Scheme())
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tasks", action="append", default=[])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-tokens", type=int, default=102_400)
    o = parser.parse_args()
    original = calibration_data.reference_model()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        candidates = {
            "itself (= float16 rounding)": original,
            "bfloat16 rounding": changed(original, root / "bfloat16", "bfloat16"),
            "AWQ INT4, defaults": root / "awq",
            "round-to-nearest INT4": changed(original, root / "rtn", "rtn"),
        }
        quantize_awq(AwqRequest(source=resolve(str(original)), out=root / "awq", scheme=Scheme()))
        print("| candidate | metric | verdict | recovery | bounds | KL, mean | same top token |")
        print("|---|---|---|---|---|---|---|")
        for name, path in candidates.items():
            report = evaluate(
                EvaluationRequest(
                    candidate=path, reference=original, data=o.data, tasks=tuple(o.tasks), limit=o.limit,
                    threshold=0.98, max_tokens=o.max_tokens, cache_folder=root / "cache",
                )
            )  # fmt: skip
            value = {m.name: m.value for m in report.metrics}
            for v in report.verdicts:
                r = v.recovery
                print(
                    f"| {name} | {v.metric} | {v.outcome} | {r.value:.2%} | {r.lower:.2%} to {r.upper:.2%} | "
                    f"{value['kl_mean']:.2g} | {value['top1_agreement']:.1%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
