"""A folder as a stage will make it, before it does: config.json and headers, and no weights.

Whatever a later stage refuses by names, shapes and config it refuses of such a folder too, with the same code. The file
of weights is sparse: it has the length that its header says and takes no disk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.artifact import MANIFEST, carried_files, manifest_of, path_from
from compress.checkpoint import SINGLE, Checkpoint, bytes_of, dtype_name, torch_dtype
from compress.files import json_bytes, write_bytes_atomically
from compress.model import StreamedModel
from compress.plan import LayerPlan
from compress.prune.shape import stored_parameters
from compress.quantized import QuantizedWeight, StaticInput
from compress.shards import safetensors_head
from compress.stage import Stage, shapes_of
from compress.weights import holds_safetensors

# What a manifest says of weights that are not there yet.
UNKNOWN = "0" * 64
# name -> (dtype as safetensors calls it, shape, bytes of the values where they matter)
_Headers = dict[str, tuple[str, tuple[int, ...], bytes | None]]


def dense(folder: Path, source: Path, config: Mapping[str, Any], stage: str) -> None:
    """A model of another config, with the dtype of the model in `source`, as `stage` will leave it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(json_bytes(dict(config)))
    dtype = "F16"
    if holds_safetensors(source):
        dtype = max(Checkpoint.open(source).tensors.values(), key=lambda info: info.num_bytes).dtype
    outline = StreamedModel.outline(folder)
    _write(
        folder,
        source,
        stage,
        {name: (dtype, tuple(value.shape), None) for name, value in stored_parameters(outline.model).items()},
    )


def same(folder: Path, source: Path, stage: str) -> None:
    """What the folder `source` is, trained on: the same config, names and shapes."""
    folder.mkdir(parents=True)
    checkpoint = Checkpoint.open(source)
    (folder / "config.json").write_bytes(json_bytes(checkpoint.config))
    _write(folder, source, stage, {name: (i.dtype, tuple(i.shape), None) for name, i in checkpoint.tensors.items()})


def quantized(folder: Path, source: Path, stage: Stage, model: StreamedModel, plan: LayerPlan) -> None:
    """What a stage with a weight format makes of `model`, opened from `source`."""
    assert stage.format is not None
    folder.mkdir(parents=True)
    config = {**stage.config(model, plan), "quantization_config": stage.format.config(plan)}
    (folder / "config.json").write_bytes(json_bytes(config))
    dtype = {"bfloat16": "BF16"}.get(str(config.get("dtype")), "F16")
    shapes = shapes_of(model, plan)
    found: _Headers = {}
    for name, info in model.checkpoint.tensors.items():
        if name.removesuffix(".weight") not in shapes:
            found[name] = (dtype if info.dtype.startswith(("F", "BF")) else info.dtype, tuple(info.shape), None)
    for layer, (rows, columns) in shapes.items():
        scheme = plan[layer]
        assert scheme.weight is not None
        groups = scheme.weight.groups(columns, layer)
        weight = QuantizedWeight(
            codes_OI=torch.empty(rows, columns, dtype=torch.uint8, device="meta"),
            scale_OG=torch.empty(rows, groups, dtype=torch.float16, device="meta"),
            zero_point_OG=torch.full((rows, groups), scheme.weight.symmetric_zero_point, dtype=torch.uint8),
            scheme=scheme.weight,
        )
        static = None
        if scheme.input is not None and not scheme.input.dynamic:
            static = StaticInput(scale=torch.ones(1), zero_point=torch.full((1,), 128, dtype=torch.uint8))
        for leaf, value in stage.format.tensors(weight, scheme, static).items():
            found[f"{layer}.{leaf}"] = (dtype_name(value.dtype), tuple(value.shape), _content(value))
    _write(folder, source, stage.name, found)


def _content(value: Tensor) -> bytes | None:
    """The values of a tensor that is not on the meta device: whether codes are symmetric is seen in them."""
    return None if value.device.type == "meta" else bytes(bytes_of(value.contiguous()))


def _write(folder: Path, source: Path, stage: str, tensors: _Headers) -> None:
    """The weights' header, what accompanies them, and a manifest whose lineage begins where the source's does."""
    members = [(n, d, shape, math.prod(shape) * torch_dtype(d).itemsize) for n, (d, shape, _) in tensors.items()]
    head = safetensors_head(members)
    with open(folder / SINGLE, "wb") as f:
        f.write(head)
        at = len(head)
        for name, _, _, size in members:
            content = tensors[name][2]
            if content is not None:
                f.seek(at)
                f.write(content)
            at += size
        f.truncate(at)
    for path in carried_files(source):
        if not (folder / path.name).exists():
            (folder / path.name).symlink_to(path.resolve())
    record = {"stage": stage, "parent": {"path": path_from(folder, source), "sha256": UNKNOWN}}
    write_bytes_atomically(folder / MANIFEST, json_bytes(manifest_of(record, source, folder).to_json()))
