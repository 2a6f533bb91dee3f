"""onnxruntime-genai's model builder, run in a process of its own with its silent changes switched off.

Left to itself, 0.18 changes what an INT4 folder computes in three places and says nothing: activations are quantized
to 8 bits (accuracy level 4), lm_head becomes INT4, and so does the embedding. It also stamps the commit of whatever
repository it is started in on the graph. Source: `builders/base.py` and `builder.py` of that version.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from compress.errors import ConfigError, UnsupportedError

PACKAGE = "onnxruntime-genai"
LM_HEAD = "/lm_head/MatMul"
EMBEDDING = "/model/embed_tokens/Gather"


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
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    last = lines[-1][:300] if lines else f"it ended with status {done.returncode}"
    if "No module named" in last and "onnxruntime_genai" in last:
        raise ConfigError(
            f'the onnx format needs {PACKAGE}, which is not installed; pip install "compress-toolkit[onnx]"'
        )
    raise UnsupportedError(f"{folder}: not supported by onnx yet: {PACKAGE}'s builder stopped with {last!r}")
