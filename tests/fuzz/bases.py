"""What is damaged: small sound model folders, an artifact, an ONNX folder and texts, made once in a scratch folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

SIZES = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
SENTENCE = "In the year {} the ship number {} sailed for the east, and the captain wrote of it at length. "
# name -> family, tied, shards
MODELS: dict[str, tuple[str, bool, int]] = {
    "llama": ("Llama", False, 1),
    "llama-shards": ("Llama", False, 3),
    "qwen3-tied": ("Qwen3", True, 1),
    "gpt2-shards": ("GPT2", True, 2),
}


def make(root: Path, kinds: set[str]) -> None:
    """Fill `root` with a folder for each name of `MODELS` and what else the `kinds` need."""
    for name, (family, tied, shards) in MODELS.items():
        if not (root / name).exists():
            _model(root / f".{name}", family, tied, shards)
            os.rename(root / f".{name}", root / name)
    text = "".join(SENTENCE.format(1800 + i, 7 * i) for i in range(300))
    (root / "text.txt").write_text(text, encoding="utf-8")
    (root / "other.txt").write_text(text.replace("ship", "train").replace("captain", "driver"), encoding="utf-8")
    if "texts" in kinds:
        _texts(root / "texts", text)
    if "artifacts" in kinds and not (root / "awq").exists():
        _run("awq", root / "llama", "-o", root / "awq", *tiny_awq(root / "text.txt"))
    if "graphs" in kinds and not (root / "graph").exists():
        _graph(root)


def tiny_awq(text: Path) -> tuple[Any, ...]:
    """Options of a run that takes a second."""
    small = ("--samples", 1, "--seq-len", 32, "--group-size", 32, "--effort", "fast", "--device", "cpu")
    return ("--calib", text, *small)


def _run(*args: Any) -> None:
    subprocess.run([sys.executable, "-m", "compress", *map(str, args)], check=True, capture_output=True)


def _model(folder: Path, family: str, tied: bool, shards: int) -> None:
    import torch
    import transformers

    import calibration_data

    cls = getattr(transformers, f"{family}Config")
    fields = set(vars(cls())) | set(cls.attribute_map)
    sizes = {k: v for k, v in SIZES.items() if k in fields and (family, k) != ("GPT2", "intermediate_size")}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(cls(**sizes, tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.mul_(3)
    size = sum(p.numel() for p in model.parameters()) * 2 // shards + 1
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.float16).save_pretrained(folder, max_shard_size=size if shards > 1 else "1GB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(calibration_data.reference_model() / file, folder / file)


def _texts(folder: Path, text: str) -> None:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(exist_ok=True)
    rows = [{"text": text[i : i + 500]} for i in range(0, len(text), 500)]
    (folder / "plain.txt").write_text(text, encoding="utf-8")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")


def _graph(root: Path) -> None:
    """The model as a plain ONNX graph with `logits`, its weights beside it."""
    import onnx
    import torch
    import transformers

    out = root / ".graph"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "llama", dtype=torch.float32).eval()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(input_ids=input_ids, use_cache=False).logits
            return logits

    shape = {"input_ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    ids = torch.arange(1, 13).reshape(2, 6)
    program = torch.onnx.export(Logits(), (ids,), dynamo=True, dynamic_shapes=shape, input_names=["input_ids"],
                                output_names=["logits"], verbose=False)  # fmt: skip
    assert program is not None
    onnx.save_model(program.model_proto, out / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(root / "llama" / file, out / file)
    os.rename(out, root / "graph")
