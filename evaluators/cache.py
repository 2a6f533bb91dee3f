"""What the reference made of the evaluation text, kept on disk, so that judging a second candidate costs half.

Kept are the last hidden states of the positions that are scored (the logits follow from them by one product), and what
was observed inside the blocks. The key is a hash of everything they depend on; a file that does not fit its key is made
anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from compress.runtime.runner import Tokens
from compress.runtime.streamed import Kept, TorchReading, TorchRunner
from compress.runtime.watch import Observed
from compress.shards import save_atomically

LARGEST = 4 << 30
TOTAL = 16 << 30
VERSION = 1


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/compress-toolkit`, or below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compress-toolkit" / "evaluate"


def key(runner: TorchRunner, sequences: Sequence[Tokens], observe: int, model_sha256: str) -> str:
    """Hash of the model's bytes, the sequences, arithmetic, thread count and library versions."""
    import transformers

    digest = hashlib.sha256()
    arithmetic = [str(runner.model.dtype), str(runner.model.device), torch.get_num_threads()]
    versions = [torch.__version__, transformers.__version__]
    digest.update(json.dumps([VERSION, model_sha256, observe, *arithmetic, *versions]).encode())
    for s in sequences:
        digest.update(f"{len(s.ids_T)} {s.first} ".encode())
        digest.update(s.ids_T.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def holds(folder: Path, name: str) -> bool:
    """Whether something is kept under this key."""
    return (folder / f"{name}.safetensors").is_file()


def load(folder: Path, name: str, runner: TorchRunner, sequences: Sequence[Tokens]) -> TorchReading | None:
    """The reading kept under this key, or None."""
    path = folder / f"{name}.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            facts: dict[str, Any] = json.loads(bytes(file.get_tensor("facts").tolist()))
            empty = Kept.empty(sequences, runner.model)
            hidden = file.get_tensor("hidden_PH")
            if hidden.shape != empty.hidden_PH.shape:
                return None
            kept = Kept(hidden_PH=hidden.to(runner.model.device), offsets=empty.offsets, first=empty.first)
            names = facts["names"]
            observed = Observed(
                names=names,
                hidden=[file.get_tensor(f"block.{i}") for i in range(len(names))],
                entropy=facts["entropy"],
                activations=facts["activations"],
            )
    except (FileNotFoundError, SafetensorError, KeyError, ValueError):
        return None
    os.utime(path)
    return TorchReading(runner.model, kept, observed if names else None)


def save(folder: Path, name: str, reading: TorchReading) -> str | None:
    """Keep a reading; the oldest make room. Returns why not, if it is not kept."""
    seen = reading.observed
    facts = {
        "names": seen.names if seen else [],
        "entropy": seen.entropy if seen else [],
        "activations": seen.activations if seen else [],
    }
    tensors = {
        "facts": torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8),
        "hidden_PH": reading.kept.hidden_PH.cpu(),
        **{f"block.{i}": h for i, h in enumerate(seen.hidden if seen else [])},
    }
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    if size > LARGEST:
        return f"the reference's results are not cached: {size / 2**30:.1f} GiB is more than {LARGEST >> 30} GiB"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # By their names these are ours; nothing else in the folder is ever removed.
        ours = [p for p in folder.glob("*.safetensors") if re.fullmatch(r"[0-9a-f]{64}", p.stem)]
        kept = sorted(ours, key=lambda p: p.stat().st_mtime_ns)
        total = sum(p.stat().st_size for p in kept) + size
        for path in kept:
            if total <= TOTAL:
                break
            total -= path.stat().st_size
            path.unlink()
        save_atomically(folder / f"{name}.safetensors", tensors)
    except (OSError, SafetensorError) as e:  # safetensors has an error of its own for a full disk
        (folder / f".{name}.safetensors.tmp").unlink(missing_ok=True)
        return f"the reference's results are not cached: {e}"
    return None
