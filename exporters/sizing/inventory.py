"""What a model consists of, for sizing: parameters by part and the dimensions that caches follow from.

Read from headers and config.json; a folder with nothing but config.json is counted from the model that transformers
would build of it. No weight is loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.checkpoint import INDEX, SINGLE, Checkpoint
from compress.errors import ArtifactError, UnsupportedError
from compress.files import read_json
from compress.formats import Stored, stored
from compress.scheme import Scheme
from compress.skeleton import meta_model

# Names of config.json's figures, in the order in which they are looked for; the first is today's.
_KEYS = {
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_heads": ("num_attention_heads", "n_head"),
    "max_positions": ("max_position_embeddings", "n_positions", "max_sequence_length"),
}
_BLOCK = re.compile(r"\.\d+\.")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.")


@dataclass(frozen=True, kw_only=True)
class Model:
    """Parameters by part, and dimensions.

    linears: in the decoder's linear layers, of which `packed` are stored quantized, in `packed_bytes`. lm_head: zero
    when it is tied to the embedding. other: norms, biases, learned positions. scheme: of the stored codes (those of
    most layers), or None.
    """

    name: str
    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int | None
    linears: int
    embedding: int
    lm_head: int
    other: int
    tied: bool
    packed: int = 0
    packed_bytes: int = 0
    scheme: Scheme | None = None

    @property
    def num_parameters(self) -> int:
        """As the model computes: a tied output matrix counts once."""
        return self.linears + self.embedding + self.lm_head + self.other

    @property
    def head_parameters(self) -> int:
        """Of the output matrix, tied or not."""
        return self.lm_head or self.embedding

    def kv_bytes_per_token(self, num_bits: int) -> int:
        """Keys and values of one token in all layers. A sliding window is counted as a full one.

        At 8 bits each token and head has a float32 scale (vLLM's `int8_per_token_head`).
        """
        scale = 4 if num_bits == 8 else 0
        return 2 * self.num_layers * self.num_kv_heads * (self.head_dim * num_bits // 8 + scale)


def read_model(folder: Path) -> Model:
    """The inventory of a model folder. Raises ArtifactError or UnsupportedError for what is not a dense decoder."""
    if not (folder / SINGLE).exists() and not (folder / INDEX).exists() and (folder / "config.json").exists():
        if not any(folder.glob("*.bin")):
            return _from_config(folder)
    return inventory(stored(Checkpoint.open(folder)))


def inventory(folder: Stored) -> Model:
    """The inventory of an opened model folder."""
    checkpoint = folder.checkpoint
    counts = {"linears": 0, "embedding": 0, "lm_head": 0, "other": 0, "packed": 0, "packed_bytes": 0}
    taken = folder.taken()
    for name, info in checkpoint.tensors.items():
        if name not in taken:
            counts[part_of(name, len(info.shape))] += math.prod(info.shape)
    for layer in folder.layers:
        numel = math.prod(folder.shape(layer))
        part = part_of(f"{layer}.weight", 2)
        counts[part] += numel
        if part == "linears":  # an output matrix in integers is counted as if it were not: never too little
            counts["packed"] += numel
            counts["packed_bytes"] += folder.num_bytes(layer)
    groups = folder.plan.groups()
    scheme = max(groups, key=lambda s: len(groups[s])).weight if groups else None
    return _model(checkpoint.config, checkpoint.path, counts, scheme)


def dimensions(config: Mapping[str, Any], folder: Path | str = "config.json") -> dict[str, Any]:
    """The dimensions among `Model`'s fields, from a config.json."""
    text = _text_config(config)
    found: dict[str, Any] = {}
    for field, keys in _KEYS.items():
        found[field] = next((int(text[k]) for k in keys if text.get(k)), None)
    if not all(found[k] for k in ("num_layers", "hidden_size", "num_heads")):
        raise UnsupportedError(
            f"{folder}: config.json of type {config.get('model_type')!r} does not give the numbers of layers, heads "
            "and hidden units, which sizing needs; only decoder-only language models can be sized"
        )
    default = 1 if text.get("multi_query") else found["num_heads"]
    found["num_kv_heads"] = int(text.get("num_key_value_heads") or text.get("num_kv_heads") or default)
    found["head_dim"] = int(text.get("head_dim") or found["hidden_size"] // found["num_heads"])
    found["name"] = Path(folder).resolve().name
    found["architecture"] = str((config.get("architectures") or [config.get("model_type")])[0])
    return found


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def part_of(name: str, dimensions: int) -> str:
    """The part of `Model` that a weight counts to, from its name and number of dimensions."""
    if _EMBEDDING.search(name):
        return "embedding"
    if _HEAD.search(name):
        return "lm_head"
    return "linears" if _BLOCK.search(name) and dimensions == 2 else "other"


def _from_config(folder: Path) -> Model:
    """Counted from the model on the meta device: the folder holds no weights."""
    config = read_json(folder / "config.json")
    if "quantization_config" in config:
        raise ArtifactError(f"{folder}: its config.json says quantized, but it holds no weights to size; fetch them")
    model = meta_model(Checkpoint(path=folder, config=config, tensors={}))
    counts = {"linears": 0, "embedding": 0, "lm_head": 0, "other": 0}
    for name, p in model.named_parameters():
        counts[part_of(name, p.ndim)] += p.numel()
    if getattr(model.config, "tie_word_embeddings", False):
        counts["lm_head"] = 0  # on the meta device a tied matrix appears twice
    return _model(config, folder, counts, None)


def _model(config: Mapping[str, Any], folder: Path, counts: Mapping[str, int], scheme: Scheme | None) -> Model:
    # A folder without an output matrix has it tied, whatever its config says or leaves to a default.
    fields: dict[str, Any] = {**dimensions(config, folder), **counts, "tied": not counts["lm_head"], "scheme": scheme}
    return Model(**fields)
