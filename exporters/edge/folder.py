"""The folder that TensorRT Edge-LLM 0.11's exporter reads right: which artifacts, and what must be rewritten for it.

Its exporter builds a Llama (SwiGLU, RMSNorm before attention and before the MLP, rotary embedding) for every
`model_type` that it does not know, ends with code 0, and only counts what it did not load. So what it may see is
decided here, from a list, and every claim is checked on what it wrote (`exporters.edge.check`, `exporters.edge.graph`).

Shapes: N out_features, K in_features, G groups along K
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.artifact import carried_files
from compress.checkpoint import INDEX, Checkpoint
from compress.errors import UnsupportedError
from compress.files import json_bytes
from compress.formats import Stored, awq_gemm, compressed_tensors, stored
from compress.quantized import QuantizedWeight
from exporters.edge import int8
from exporters.edge.split import check_heads, head_dim, parts, write_shards
from exporters.reader import Layout

# model_type -> where that comes from. Every other type is refused before any work.
ARCHITECTURES = {
    "llama": "Edge-LLM 0.11 supported models: Llama 3.x",
    "qwen2": "Edge-LLM 0.11 supported models: Qwen2 and Qwen2.5",
    "qwen3": "Edge-LLM 0.11 supported models: Qwen3",
    "mistral": "not on Edge-LLM's list; the graph is Llama's, and ours agrees with it",
    "phi3": "not on Edge-LLM's list; a Llama once its fused projections are split, which is exact",
}
GROUP_SIZE = 128  # Int4GroupwiseGemmPluginV2
# AutoAWQ with other zero points than 8 is clipped silently by the exporter; its INT4 product takes groups of 128 only.
# Of INT8 it has W8A8 with one range of inputs.
LAYOUT = Layout(num_bits=(4,), group_sizes=(GROUP_SIZE,), symmetric=True, w8a8=("a8-static",))
LLAMA3_DIMS = (64, 128)  # "Llama-3 RoPE supports rotaryDim 64 or 128 only", a message of its 0.11.0 runtime
MULTIPLE_N = 64  # its fragments, tensorrt_edgellm 0.11.0 checkpoint/repacking.py

# A template for models that have none (the exporter refuses such folders): the messages' text as it is.
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
TEMPLATE = "chat_template.jinja"
_FREQUENCIES = "rotary_emb.inv_freq"  # old checkpoints store it; it is computed, so the exporter skips it


@dataclass(frozen=True, kw_only=True)
class Handed:
    """What the exporter was given.

    tensors: how many it must load; ignorable: how many it must skip. notes: for the user.
    """

    tensors: int
    ignorable: int
    notes: list[str]


def check_model(checkpoint: Checkpoint, context: int) -> None:
    """Raise UnsupportedError for an artifact that the exporter or its runtime would get wrong. Reads headers only."""
    config, path = checkpoint.config, checkpoint.path
    check_config(path, config, context)
    folder = stored(checkpoint)
    if "lm_head" in folder:
        raise UnsupportedError(f"{path}: its lm_head is quantized, and edge takes it in float16; quantize without it")
    schemes = folder.plan.groups()
    if folder.format is compressed_tensors and schemes and all(LAYOUT.takes_int8(scheme) for scheme in schemes):
        return
    if folder.format not in (None, awq_gemm):
        raise UnsupportedError(
            f"{path}: quant_method {folder.format.QUANT_METHOD!r} is not supported by edge: TensorRT Edge-LLM "
            "0.11 would export it with uninitialised weights; quantize with `compress awq --bits 4 --sym` or `compress "
            "int8 --static`"
        )
    for scheme in folder.plan.groups():
        if scheme.weight is not None and scheme.weight.group_size != GROUP_SIZE:
            raise UnsupportedError(
                f"{path}: group_size {scheme.weight.group_size} is not supported by edge, only "
                f"{GROUP_SIZE}; quantize with `compress awq --bits 4 --sym --group-size {GROUP_SIZE}`"
            )
    check_rows(path, config, {name: folder.shape(name) for name in folder.layers})


def check_config(path: Path, config: Mapping[str, Any], context: int) -> None:
    """Raise UnsupportedError for a model that the exporter or its runtime would get wrong, from config.json alone."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise UnsupportedError(
            f"{path}: {kind} is not supported by edge yet: TensorRT Edge-LLM 0.11 would write it as a Llama without a "
            f"word; {', '.join(ARCHITECTURES)} are"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedError(
            f"{path}: hidden_act {config['hidden_act']!r} is not supported by edge yet, only silu is"
        )
    window = _window(config)
    if window is not None and context > window:
        raise UnsupportedError(
            f"{path}: a context of {context} exceeds its sliding window of {window} tokens, which edge does not "
            f"support; pass --context {window}"
        )
    rope = rope_of(config)
    if rope["rope_type"] not in ("default", "llama3") or float(rope["partial_rotary_factor"]) != 1.0:
        raise UnsupportedError(
            f"{path}: rotary embedding {rope['rope_type']!r} (partial {rope['partial_rotary_factor']}) is not "
            "supported by edge yet; default and llama3 are"
        )
    if rope["rope_type"] == "llama3" and head_dim(config) not in LLAMA3_DIMS:
        raise UnsupportedError(
            f"{path}: llama3 rotary embedding with head_dim {head_dim(config)} is not supported by edge, only with "
            f"{' or '.join(str(n) for n in LLAMA3_DIMS)}"
        )


def check_rows(path: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise UnsupportedError for a quantized layer, by its `(out_features, in_features)`, that edge does not pack."""
    for name, (rows, _) in shapes.items():
        for part, size in parts(name, rows, config):
            if size % MULTIPLE_N:
                raise UnsupportedError(
                    f"{path}: {part} has {size} out_features, not a multiple of {MULTIPLE_N}, which edge's INT4 "
                    "product needs"
                )


def check_zero_points(checkpoint: Checkpoint) -> None:
    """Raise UnsupportedError unless every stored zero point is 8.

    Edge-LLM 0.11 shifts other codes by their zero point and clips them to 0..15, silently: 0.6 % of the weights of a
    Gaussian matrix come out wrong.
    """
    folder = stored(checkpoint)
    for name in folder.layers if folder.format is awq_gemm else ():
        if not awq_gemm.is_symmetric(checkpoint, name, folder.scheme(name)):
            zeros_OG = folder.weight(name).zero_point_OG
            bad = int((zeros_OG != 8).sum())
            raise UnsupportedError(
                f"{checkpoint.path}: {name} has {bad} of {zeros_OG.numel()} zero points other than 8, which edge would "
                "clip silently; quantize with `compress awq --bits 4 --sym`"
            )


def hand_over(checkpoint: Checkpoint, folder: Path) -> Handed:
    """Make `folder` what the exporter shall read; weights are linked, not copied, unless they must be split."""
    config = dict(checkpoint.config)
    notes = []
    if ARCHITECTURES[config["model_type"]].startswith("not on"):
        notes.append(f"{config['model_type']}: {ARCHITECTURES[config['model_type']]}")
    for carried in carried_files(checkpoint.path):
        shutil.copyfile(carried, folder / carried.name)
    if not _has_template(folder):
        (folder / TEMPLATE).write_text(PLAIN_TEMPLATE, encoding="utf-8")
        notes.append("the model has no chat template: one that passes the text through was added")
    config.pop("sliding_window", None)  # check_model: the context never reaches it
    if stored(checkpoint).format is compressed_tensors:
        names = int8.write_folder(checkpoint, folder)
        config.pop("quantization_config")  # ModelOpt's own file says it
    elif config["model_type"] == "phi3":
        names = write_shards(checkpoint, folder, _int4_tensors)
    else:
        names = list(checkpoint.tensors)
        for file in sorted({info.file for info in checkpoint.tensors.values()} | {INDEX}):
            if (checkpoint.path / file).exists():
                os.symlink((checkpoint.path / file).resolve(), folder / file)
    if config["model_type"] == "phi3":
        config["model_type"], config["architectures"] = "llama", ["LlamaForCausalLM"]
    (folder / "config.json").write_bytes(json_bytes(config))
    ignorable = sum(name.endswith(_FREQUENCIES) for name in names)
    return Handed(tensors=len(names) - ignorable, ignorable=ignorable, notes=notes)


# ---- what must come out --------------------------------------------------------------------------------


def expected_int4(checkpoint: Checkpoint) -> Iterator[tuple[str, QuantizedWeight]]:
    """Every INT4 layer under the name that the export must have, one at a time."""
    folder = stored(checkpoint)
    for name in folder.layers if folder.format is awq_gemm else ():
        yield from _split(name, folder.weight(name), checkpoint.config)


def expected_dense(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Every other tensor under the export's name, in float16; the input embedding is `model.embed_tokens.weight`."""
    taken = stored(checkpoint).taken()
    for name in checkpoint.names():
        if name.endswith(_FREQUENCIES) or name in taken:
            continue
        value = checkpoint.tensor(name).to(torch.float16)
        layer, _, leaf = name.rpartition(".")
        start = 0
        for part, size in parts(layer, value.shape[0], checkpoint.config):
            yield f"{part}.{leaf}", value[start : start + size]
            start += size


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config's rotary embedding in today's form: rope_type, rope_theta, and what the type needs."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope.setdefault("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    return rope


# ---- helpers -------------------------------------------------------------------------------------------


def _window(config: Mapping[str, Any]) -> int | None:
    """The sliding window in tokens, if any layer has one. Qwen2 and Qwen3 state one that they do not use."""
    if config.get("use_sliding_window") is False:
        return None
    if "layer_types" in config and "sliding_attention" not in config["layer_types"]:
        return None
    window = config.get("sliding_window")
    return int(window) if window else None


def _split(layer: str, whole: QuantizedWeight, config: Mapping[str, Any]) -> Iterator[tuple[str, QuantizedWeight]]:
    """A layer's codes as those of the layers that its rows are exported as."""
    start = 0
    for part, size in parts(layer, whole.codes_OI.shape[0], config):
        rows = slice(start, start + size)
        start += size
        yield (
            part,
            QuantizedWeight(
                codes_OI=whole.codes_OI[rows],
                scale_OG=whole.scale_OG[rows],
                zero_point_OG=whole.zero_point_OG[rows],
                scheme=whole.scheme,
            ),
        )


def _int4_tensors(source: Stored, layer: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors by leaf of each of the layers that a layer's rows are exported as."""
    whole = source.weight(layer)
    config, rows = source.checkpoint.config, whole.codes_OI.shape[0]
    check_heads(source.checkpoint.path, layer, rows, parts(layer, rows, config))
    for part, q in _split(layer, whole, config):
        yield part, awq_gemm.tensors(q)


def _has_template(folder: Path) -> bool:
    if any(folder.glob("chat_template*")):
        return True
    path = folder / "tokenizer_config.json"
    return path.exists() and bool(json.loads(path.read_text(encoding="utf-8")).get("chat_template"))
