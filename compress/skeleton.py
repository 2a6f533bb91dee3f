"""The transformers model that a config.json describes, its parameters on the meta device, checked before it is built.

A config is text that anyone can edit: ten million layers are built until memory is gone, a table of another size is
read as garbage. So first the sizes are compared with what the weight files can hold, then the names and shapes of all
parameters with the tensors that are there, from headers alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.checkpoint import Checkpoint
from compress.decoder import candidates, find_decoder
from compress.errors import ArtifactError, CompressError, UnsupportedError, explained
from compress.files import read_json
from compress.formats import Stored, stored
from compress.names import source_names

GENERATION = "generation_config.json"
# Layers that are built whatever the weights are: names and shapes are compared then, which tells more.
MAX_LAYERS = 1000
# The largest size in a config without weights beside it (`compress fit` sizes it).
MAX_SIZE = 1 << 32
# Buffers that a model computes for itself: rotary and sinusoidal tables, masks. The largest known are 0.1 GB.
MAX_BUFFER_BYTES = 4 << 30
_LAYERS = re.compile(r"(^|_)(n_?)?(layers?|blocks|depth)$")
# Numbers that no tensor has to be as long as: positions, ids, and what only scales.
_FREE = re.compile(r"position|length|window|context|token|(^|_)ids?$|seed|theta|factor|base|n_ctx|chunk|offset|version")
# Numbers that a side of a tensor is as long as.
_SIZES = re.compile(
    r"size|dim|head|embd|inner|hidden|rank|expert|label|width|channel|group|ffn?$|ff_|model$|state|^n_|num_"
)
_FLOATS = ("F", "BF")


def meta_model(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> nn.Module:
    """The causal LM of `checkpoint.config` on the meta device, every parameter checked against the folder's tensors.

    Buffers are real: rotary frequencies and the like are computed by the model, not stored. A checkpoint without
    tensors (a config alone) is not checked against any.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    folder = stored(checkpoint)
    check_sizes(checkpoint)
    config = _config(checkpoint, trust_remote_code)
    kind = checkpoint.config.get("model_type")
    what = f"{checkpoint.path}: transformers cannot build a causal language model of type {kind!r}"
    way_out = (
        "mend config.json or fetch it again; for a newer architecture upgrade transformers, or pass "
        "--trust-remote-code to `compress awq` if the folder ships its own code and you trust it (evaluate and export "
        "do not run such code)"
    )

    def build() -> nn.Module:
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
        return model

    with explained(what, way_out, UnsupportedError):
        with torch.device("meta"):
            skeleton = build()
    _refuse_experts(checkpoint, skeleton)
    _check_buffers(checkpoint, skeleton)
    mismatch: CompressError | None = None
    if checkpoint.tensors:
        try:
            check_shapes(folder, skeleton, source_names(folder, skeleton))
        except CompressError as e:
            mismatch = e
    with explained(what, way_out, UnsupportedError), init_empty_weights(include_buffers=False):
        model = build().eval()
    if mismatch is not None:
        find_decoder(model, checkpoint.path)  # what it is comes before what it lacks
        raise mismatch
    return model


def check_sizes(checkpoint: Checkpoint) -> None:
    """Raise ArtifactError when config.json names a size that the weight files cannot hold, before it is used.

    Each layer has a tensor of its own, and no side of a tensor is longer than all numbers that are stored.
    """
    tensors = checkpoint.tensors.values()
    layers = max(len(tensors), MAX_LAYERS)
    numbers = max(1 << 20, 8 * sum(t.numel for t in tensors)) if tensors else MAX_SIZE
    for key, value in _integers(checkpoint.config):
        name = key.rpartition(".")[2]
        is_size = _SIZES.search(name) and not _FREE.search(name)
        if (_LAYERS.search(name) and value > layers) or (is_size and value > numbers):
            raise ArtifactError(
                f"{checkpoint.path}: config.json says {key} = {str(value)[:40]}, more than the {len(tensors)} tensors "
                "that are there can hold; restore the config.json that belongs to these weights"
            )


def check_shapes(folder: Stored, model: nn.Module, source: Mapping[str, str]) -> None:
    """Raise ArtifactError unless every parameter's tensor has its shape and holds floating-point numbers or codes."""
    checkpoint = folder.checkpoint
    for name, value in model.state_dict(keep_vars=True).items():
        origin = source[name]
        layer = origin.removesuffix(".weight")
        quantized = origin.endswith(".weight") and layer in folder
        found = folder.shape(layer) if quantized else checkpoint.info(origin).shape
        if found != tuple(value.shape):
            raise ArtifactError(
                f"{checkpoint.path}: tensor {origin} has shape {found}, but config.json says {tuple(value.shape)}; the "
                "config belongs to another model, or the weights do"
            )
        if not quantized:
            checkpoint.dtype(origin)
            dtype = checkpoint.info(origin).dtype
            if value.is_floating_point() and not dtype.startswith(_FLOATS):
                raise ArtifactError(
                    f"{checkpoint.path}: tensor {origin} is stored as {dtype}, but the model computes with "
                    "floating-point numbers; pass the full-precision model"
                )


def _integers(value: Any, path: str = "") -> Iterator[tuple[str, int]]:
    """Every integer of a config with its dotted key; those of lists under the list's key."""
    if type(value) is int:
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in ("quantization_config", "id2label", "label2id"):
                yield from _integers(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _integers(item, path)


def _config(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """transformers' config object; UnsupportedError, naming what the folder is, unless it is of a causal LM."""
    from transformers import AutoConfig, AutoModelForCausalLM, __version__

    kind = checkpoint.config.get("model_type")
    with explained(
        f"{checkpoint.path}: transformers {__version__} does not take its config.json of type {kind!r}",
        "mend it or fetch it again; for a newer architecture upgrade transformers, or pass --trust-remote-code to "
        "`compress awq` if the folder ships its own code and you trust it (evaluate and export do not run such code)",
        UnsupportedError,
    ):
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    _check_generation(checkpoint.path)
    named = (checkpoint.config.get("architectures") or [None])[0]
    called = f"{named} (type {kind!r})" if named else f"a model of type {kind!r}"
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{checkpoint.path}: {called} is an encoder with a decoder, not a causal language model; pass a "
            "decoder-only model such as a Llama, Qwen or Gemma"
        )
    known = type(config) in AutoModelForCausalLM._model_mapping
    if not known and "AutoModelForCausalLM" not in (checkpoint.config.get("auto_map") or {}):
        raise UnsupportedError(
            f"{checkpoint.path}: {called} is not a causal language model; pass a decoder-only model such as a Llama, "
            "Qwen or Gemma"
        )
    return config


def _check_generation(folder: Path) -> None:
    """transformers reads generation_config.json with the model, and artifacts carry it: it must take it."""
    from transformers import GenerationConfig

    if not (folder / GENERATION).exists():
        return
    read_json(folder / GENERATION)
    with explained(
        f"{folder / GENERATION}: transformers does not take it",
        "mend it, fetch it again, or delete it if you need no defaults",
    ):
        GenerationConfig.from_pretrained(folder, local_files_only=True)


def _refuse_experts(checkpoint: Checkpoint, skeleton: nn.Module) -> None:
    """Experts are tensors of three dimensions, which no layer here is made of."""
    for list_name, blocks in candidates(skeleton).items():
        for i, block in enumerate(blocks):
            for name, p in block.named_parameters():
                if p.ndim >= 3 and min(p.shape) > 1 and "conv" not in name:
                    raise UnsupportedError(
                        f"{checkpoint.path}: {checkpoint.config.get('model_type')} keeps experts in "
                        f"{list_name}.{i}.{name} {tuple(p.shape)}; mixture-of-experts models are not supported yet, "
                        "use a dense model"
                    )


def _check_buffers(checkpoint: Checkpoint, skeleton: nn.Module) -> None:
    total = 0
    for name, buffer in skeleton.named_buffers():
        total += buffer.numel() * buffer.element_size()
        if total > MAX_BUFFER_BYTES:
            raise ArtifactError(
                f"{checkpoint.path}: config.json makes the model compute tables of more than {total / 1e9:.0f} GB "
                f"({name} {list(buffer.shape)}); restore the config.json that belongs to these weights"
            )
