"""Does peak memory grow with depth? Quantizes synthetic models of 8, 32 and 128 equal blocks, each in its own process.

    python tests/bench/depth.py [--hidden 512] [--json FILE]

Prints a table of peak resident memory. The claim holds when 128 blocks need no more than 10 % above 8 blocks, beyond
what the manifest's own rows take.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import calibration_data

DEPTHS = (8, 32, 128)


def build(folder: Path, depth: int, hidden: int) -> None:
    """A Llama of `depth` random blocks in one shard a block, with the reference tokenizer; never whole in memory."""
    from transformers import LlamaConfig

    folder.mkdir()
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=depth,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((calibration_data.reference_model() / name).read_bytes())
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.03).half()

    weight_map: dict[str, str] = {}

    def shard(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    kv = hidden // 2
    shard(
        "outside.safetensors",
        {"model.embed_tokens.weight": random(4096, hidden), "model.norm.weight": random(hidden) + 1},
    )
    for i in range(depth):
        p = f"model.layers.{i}."
        tensors = {
            p + "input_layernorm.weight": random(hidden) + 1,
            p + "post_attention_layernorm.weight": random(hidden) + 1,
        }
        tensors.update(
            {
                f"{p}self_attn.{n}_proj.weight": random(o, hidden)
                for n, o in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden))
            }
        )
        tensors.update({f"{p}mlp.{n}_proj.weight": random(2 * hidden, hidden) for n in ("gate", "up")})
        tensors[f"{p}mlp.down_proj.weight"] = random(hidden, 2 * hidden)
        shard(f"block-{i:03d}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def measure(folder: Path, out: Path) -> tuple[float, float]:
    """Seconds and peak resident MiB of `compress awq` in a process of its own."""
    command = [sys.executable, "-m", "compress", "awq", str(folder), "--samples", "8", "--seq-len", "256", "--json"]
    command += ["--calib", str(calibration_data.default_calibration()), "-o", str(out)]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(errors.decode())
    return time.monotonic() - started, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for depth in DEPTHS:
            folder = Path(scratch) / f"depth-{depth}"
            build(folder, depth, arguments.hidden)
            size = sum(p.stat().st_size for p in folder.glob("*.safetensors")) / 2**20
            seconds, peak = measure(folder, Path(scratch) / f"out-{depth}")
            rows.append({"blocks": depth, "model_mib": size, "peak_mib": peak, "seconds": seconds})
            print(f"{depth} blocks done", file=sys.stderr, flush=True)
    print("| blocks | model on disk, MiB | peak resident, MiB | seconds |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['blocks']} | {row['model_mib']:.0f} | {row['peak_mib']:.0f} | {row['seconds']:.1f} |")
    growth = rows[-1]["peak_mib"] / rows[0]["peak_mib"]
    print(f"\npeak at {DEPTHS[-1]} blocks / peak at {DEPTHS[0]} blocks = {growth:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
