"""onnxruntime-genai's model builder, run in a process of its own with its silent changes switched off.

Left to itself, 0.18 changes what an INT4 folder computes in three places and says nothing: activations are quantized
to 8 bits (accuracy level 4), lm_head becomes INT4, and so does the embedding. It also stamps the commit of whatever
repository it is started in on the graph. Source: `builders/base.py` and `builder.py` of that version.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from compress.artifact import carried_files
from compress.errors import ConfigError, UnsupportedError, out_of_room
from compress.formats import Stored, awq_gemm
from compress.quantized import QuantizedWeight
from compress.shards import save_atomically

PACKAGE = "onnxruntime-genai"
LM_HEAD = "/lm_head/MatMul"
EMBEDDING = "/model/embed_tokens/Gather"


def stand_in(folder: Stored, dense: Sequence[str], out: Path) -> Path:
    """A folder like the AutoAWQ artifact, with placeholder codes for the layers that it left dense; returns `out`.

    The builder takes every layer of such a folder for quantized. The placeholders only hold a place in its graph.
    """
    checkpoint = folder.checkpoint
    out.mkdir()
    for path in [checkpoint.path / "config.json", *carried_files(checkpoint.path)]:
        shutil.copyfile(path, out / path.name)
    scheme = folder.plan.only().weight
    assert scheme is not None
    left_out = {f"{layer}.weight" for layer in dense}
    tensors = checkpoint.read(name for name in checkpoint.names() if name not in left_out)
    for layer in dense:
        out_features, in_features = checkpoint.info(f"{layer}.weight").shape
        if out_features % awq_gemm.PACK or in_features % scheme.group_size:
            raise UnsupportedError(
                f"{layer}: a dense layer of {out_features} x {in_features} beside groups of {scheme.group_size} is not "
                "supported by onnx yet"
            )
        groups = scheme.groups(in_features, layer)
        placeholder = QuantizedWeight(
            codes_OI=torch.zeros(out_features, in_features, dtype=torch.uint8),
            scale_OG=torch.ones(out_features, groups, dtype=torch.float16),
            zero_point_OG=torch.zeros(out_features, groups, dtype=torch.uint8),
            scheme=scheme,
        )
        tensors.update({f"{layer}.{leaf}": value for leaf, value in awq_gemm.tensors(placeholder).items()})
    save_atomically(out / "model.safetensors", tensors)
    return out


def build(folder: Path, out: Path, *, precision: str, accuracy_level: int, fuse_qkv: bool = True) -> None:
    """Write the builder's folder for the CPU provider into `out`.

    precision: `int4` for an AutoAWQ folder, `fp32` for a dense one. accuracy_level: of MatMulNBits; 1 computes with
    float32 activations, 4 quantizes them to 8 bits. UnsupportedError, with the builder's last words, when it fails.
    """
    options = [
        f"accuracy_level={accuracy_level}",
        f"nodes_to_exclude={LM_HEAD},{EMBEDDING}",
        "shared_embeddings=false",
        "windowed_kv_cache=false",  # its ring buffer must be longer than the window, whatever the context
        f"fuse_qkv={str(fuse_qkv).lower()}",
    ]
    with tempfile.TemporaryDirectory() as scratch:  # outside any repository, so that no commit can be stamped
        command = [
            sys.executable, "-m", "onnxruntime_genai.models.builder", "--input", str(folder.resolve()),
            "--output", str(out.resolve()), "--precision", precision, "--execution_provider", "cpu",
            "--cache_dir", str(Path(scratch, "cache")), "--extra_options", *options,
        ]  # fmt: skip
        offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(
            command, cwd=scratch, env=os.environ | offline, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    if done.returncode == 0:
        return
    full = out_of_room(RuntimeError(done.stderr))
    if full is not None:
        raise full
    if done.returncode == -signal.SIGKILL:
        raise ConfigError(
            f"{folder}: {PACKAGE}'s builder was killed, most likely for want of memory; it holds the whole model, so "
            "use a machine with more, or a smaller model"
        )
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    last = lines[-1][:300] if lines else f"it ended with status {done.returncode}"
    if "No module named" in last and "onnxruntime_genai" in last:
        raise ConfigError(
            f'the onnx format needs {PACKAGE}, which is not installed; pip install "compress-toolkit[onnx]"'
        )
    raise UnsupportedError(f"{folder}: not supported by onnx yet: {PACKAGE}'s builder stopped with {last!r}")
