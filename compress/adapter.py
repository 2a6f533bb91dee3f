"""A LoRA adapter merged into its base model: `W + scale * B A`, as an ordinary model folder, a tensor at a time.

Hu et al., "LoRA", arXiv:2106.09685. What is computed is what `peft.merge_and_unload` computes (the product in float32,
the sum rounded to the base's dtype; a test compares them), but nothing is held: of the base a few rows of one matrix
are in memory, and peft need not be installed. An adapter that is more than that (DoRA, trained biases, whole modules,
embeddings, a changed base) is refused by name: a part of it would be lost without a word.

Shapes: O out_features, I in_features, R rank
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import output, stage
from compress.artifact import MANIFEST, carried_files, file_hashes, manifest_of, names_in, path_from, read_manifest
from compress.artifact import write_manifest as sign
from compress.assemble import MAX_SHARD_BYTES, PART_BYTES
from compress.checkpoint import read_header
from compress.disk import check_free_space
from compress.errors import ArtifactError, ConfigError, UnsupportedError
from compress.files import file_sha256, is_file, json_bytes, read_json, write_bytes_atomically
from compress.model import StreamedModel
from compress.shards import merge_shards, save_in_parts, tensor_sha256
from compress.tell import SILENT, Tell
from compress.workspace import Source

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LORA = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
# What an adapter may say that a plain sum does not compute: its value where it says nothing.
_PLAIN: Mapping[str, Any] = {
    "use_dora": False, "fan_in_fan_out": False, "modules_to_save": None, "bias": "none", "lora_bias": False,
    "layer_replication": None, "trainable_token_indices": None, "target_parameters": None, "use_bdlora": None,
    "alora_invocation_tokens": None, "arrow_config": None, "use_qalora": False,
}  # fmt: skip
# Ways to begin training that leave the base model as it was.
_STARTS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, kw_only=True)
class Update:
    """What is added to one matrix: `scale * B A`. a_RI, b_OR: float32."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float

    def rows(self, start: int, stop: int) -> Tensor:
        """The sum's second term for these rows, float32 `[O, I]`."""
        return (self.b_OR[start:stop] @ self.a_RI).mul_(self.scale)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A folder that peft saved. updates: by the name of the module in the model. sha256: of its two files."""

    path: Path
    updates: Mapping[str, Update]
    sha256: dict[str, str]


def read_adapter(folder: Path) -> Adapter:
    """A LoRA adapter. ArtifactError for a damaged one, UnsupportedError for one that is more than LoRA."""
    for name in (CONFIG, WEIGHTS):
        if not is_file(folder / name):
            raise ArtifactError(
                f"--adapter {folder}: {name} is not there; pass the folder that peft's save_pretrained wrote, as "
                "safetensors"
            )
    config = read_json(folder / CONFIG)
    _refuse_more(folder, config)
    from safetensors.torch import load_file

    halves: dict[str, dict[str, Tensor]] = {}
    for name, value in sorted(load_file(folder / WEIGHTS).items()):
        found = _LORA.fullmatch(name)
        if found is None or value.ndim != 2:
            raise UnsupportedError(f"--adapter {folder}: {name} is not a LoRA matrix of a linear; merge it with peft "
                                   "(merge_and_unload) and pass the merged folder")  # fmt: skip
        if not bool(torch.isfinite(value).all()):
            raise ArtifactError(f"--adapter {folder}: {name} holds NaN or infinite values; train or fetch it again")
        halves.setdefault(found[1], {})[found[2]] = value.float()
    updates = {}
    for module, pair in halves.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise ArtifactError(f"--adapter {folder}: {module} has no lora_A and lora_B of one rank; fetch it again")
        updates[module] = Update(a_RI=pair["A"], b_OR=pair["B"], scale=_scale(config, module, len(pair["A"])))
    if not updates:
        raise ArtifactError(f"--adapter {folder}: {WEIGHTS} holds no tensors; fetch it again")
    hashes = {name: file_sha256(folder / name) for name in (CONFIG, WEIGHTS)}
    return Adapter(path=folder, updates=updates, sha256=hashes)


def _refuse_more(folder: Path, config: Mapping[str, Any]) -> None:
    """UnsupportedError for what a sum of products does not compute."""
    way_out = "merge it with peft (merge_and_unload) and pass the merged folder"
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"--adapter {folder}: peft_type {kind!r} is not merged, only LORA is; {way_out}")
    for key, plain in _PLAIN.items():
        if config.get(key) not in (plain, None, False, [], {}):
            raise UnsupportedError(f"--adapter {folder}: {key}={json.dumps(config[key])} is not merged; {way_out}")
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        raise UnsupportedError(
            f"--adapter {folder}: init_lora_weights={start!r} changed the base model when training began; {way_out}"
        )


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """`alpha / rank`, or over its root; alpha may differ by module, named as peft's patterns do."""
    patterns = config.get("alpha_pattern") or {}
    key = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), None)
    alpha = float(config["lora_alpha"] if key is None else patterns[key])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


# ---- the merged folder ---------------------------------------------------------------------------------


def merged(source: Source, adapter: Path, workspace: Path, *, trust_remote_code: bool, tell: Tell = SILENT) -> Source:
    """The model with the adapter in it, as an artifact in the workspace; one that is there already is used as it is.

    Raises CompressError for an adapter of another model, before anything is written.
    """
    found = read_adapter(adapter)
    name = f"{source.name}-{adapter.resolve().name}"
    out = workspace / name
    model = StreamedModel.open(source.path, trust_remote_code=trust_remote_code)
    stage.refuse_quantized(model)
    updates = _by_tensor(model, found)
    made = Source(path=out, name=name, said=f"{source.said} with {adapter}", is_reference=source.is_reference)
    parent = model.checkpoint.content_sha256()
    manifest = read_manifest(out) if out.is_dir() else None
    if manifest is not None and (manifest.record["options"], manifest.record["parent"]["sha256"]) == (
        {"adapter": found.sha256}, parent,
    ):  # fmt: skip
        tell.say(f"{out} is {made.said} already, and is used as it is")
        return made
    tell.say(f"merging {adapter} into {source.path}: {len(updates)} matrices")
    _write(source, out, model, updates, found, parent)
    return made


def _by_tensor(model: StreamedModel, adapter: Adapter) -> dict[str, Update]:
    """The updates by the checkpoint's names. ConfigError for modules or shapes that the model has not."""
    out = {}
    for module, update in adapter.updates.items():
        try:
            name = model.source_name(f"{module}.weight")
        except KeyError:
            raise ConfigError(
                f"--adapter {adapter.path}: {module} is no linear of {model.checkpoint.path}; pass the model that the "
                "adapter was trained on"
            ) from None
        if not name.endswith(f"{module.rpartition('.')[2]}.weight"):
            raise UnsupportedError(
                f"--adapter {adapter.path}: {module} shares {name} with another part of {model.checkpoint.path}, which "
                "would change with it; merge it with peft (merge_and_unload) and pass the merged folder"
            )
        shape, wanted = tuple(model.checkpoint.info(name).shape), (len(update.b_OR), update.a_RI.shape[1])
        if shape != wanted:
            raise ConfigError(
                f"--adapter {adapter.path}: {module} is {wanted} there and {shape} in {model.checkpoint.path}; pass "
                "the model that the adapter was trained on"
            )
        out[name] = update
    return out


def _write(
    source: Source, out: Path, model: StreamedModel, updates: Mapping[str, Update], adapter: Adapter, parent: str
) -> None:
    """Merge, verify, sign, publish."""
    checkpoint = model.checkpoint
    with output.reserved(out, {"the model": source.path, "the adapter": adapter.path}, force=False) as place:
        size = sum(info.num_bytes for info in checkpoint.tensors.values())
        check_free_space(out.parent, 2 * size)
        record = {
            "stage": "merge",
            "format": "dense",
            "options": {"adapter": adapter.sha256},
            "parent": {"path": path_from(out, source.path), "sha256": parent},
            "adapter": {"path": path_from(out, adapter.path), "modules": sorted(adapter.updates)},
            "versions": stage.versions(),
        }
        run = place.start({"stage": "merge", "adapter": adapter.sha256, "parent": parent}, resume=False)
        parts, meant = [], {}
        for number, name in enumerate(checkpoint.names()):
            path = run.folder / f"part-{number:05d}.safetensors"
            info = checkpoint.info(name)
            dtype = checkpoint.dtype(name)
            _, meant[name] = save_in_parts(
                path, name, dtype, tuple(info.shape), _rows(model, name, dtype, updates.get(name))
            )
            parts.append(path)
        staged = run.new_staged()
        merge_shards(parts, staged, max_shard_bytes=MAX_SHARD_BYTES)
        write_bytes_atomically(staged / "config.json", json_bytes(checkpoint.config))
        for path in carried_files(source.path):
            write_bytes_atomically(staged / path.name, path.read_bytes())
        for name, digest in meant.items():
            if tensor_sha256(_again(staged, name)) != digest:
                raise ArtifactError(
                    f"{out}: {name} differs from what was computed; the disk or memory is faulty, run again"
                )
        sign(staged, manifest_of(record, source.path, out), file_hashes(staged, names_in(staged)))
        assert is_file(staged / MANIFEST)
        run.publish()


def _rows(model: StreamedModel, name: str, dtype: torch.dtype, update: Update | None) -> Iterator[Tensor]:
    """A tensor, some rows at a time, with what is added to it."""
    info = model.checkpoint.info(name)
    if not info.shape:
        yield model.checkpoint.tensor(name)
        return
    step = max(1, info.shape[0] * PART_BYTES // max(1, info.num_bytes))
    for start in range(0, info.shape[0], step):
        stop = min(start + step, info.shape[0])
        part = model.checkpoint.slice(name, start, stop)
        yield part if update is None else (part.float() + update.rows(start, stop)).to(dtype)


def _again(folder: Path, name: str) -> Tensor:
    """A tensor as another library reads it."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        if name in read_header(path):
            with safe_open(path, framework="pt") as file:
                found: Tensor = file.get_tensor(name)
                return found
    raise ArtifactError(f"{folder}: {name} was not written; run again")
