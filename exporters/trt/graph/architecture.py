"""What the graph must know of a decoder, as data: read once from the model's config and its tensors' names.

Eight families share one shape: norm, attention, norm, gated MLP. They differ in what `Family` says and in numbers of
their configs. Whatever the graph does not write is refused here, by name, before any work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from compress.errors import UnsupportedError
from compress.model import StreamedModel

FORMAT = "onnx-trt"
Activation = Literal["silu", "gelu_tanh", "gelu"]

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary embedding of the first `dims` of a head's values. `original_context` counts tokens.

    kind `linear` divides every frequency by `factor`; `llama3` divides the low ones and blends between (Llama 3.1).
    """

    theta: float
    dims: int
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What may differ from one decoder layer to the next. `window`: how many tokens back attention sees, itself
    included.
    """

    rope: Rope
    window: int | None


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a model type always is, whatever its config says.

    norm_offset: added to the stored weight of every norm (Gemma stores w, uses 1 + w). post_norms: a second pair of
    norms, on what attention and MLP return. qk_norm: queries and keys are normalised head by head. fused: q, k, v are
    one linear and gate, up another. scaled_embedding: embeddings times sqrt(hidden size).
    """

    norm_offset: float = 0.0
    post_norms: bool = False
    qk_norm: bool = False
    fused: bool = False
    scaled_embedding: bool = False


FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(qk_norm=True),
    "phi3": Family(fused=True),
    "gemma": Family(norm_offset=1.0, scaled_embedding=True),
    "gemma2": Family(norm_offset=1.0, scaled_embedding=True, post_norms=True),
    "gemma3_text": Family(norm_offset=1.0, scaled_embedding=True, post_norms=True, qk_norm=True),
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder. Sizes count values, `max_positions` tokens; a soft cap c replaces x by c * tanh(x / c)."""

    model_type: str
    family: Family
    layers: tuple[Layer, ...]
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    activation: Activation
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    tied: bool


def read(model: StreamedModel) -> Architecture:
    """The architecture of an opened model. UnsupportedError names what the graph cannot express."""
    config: Any = model.model.config
    kind = config.model_type
    if kind not in FAMILIES:
        raise UnsupportedError(
            f"{model.checkpoint.path}: {kind} is not supported by {FORMAT} yet; it writes {', '.join(FAMILIES)}"
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedError(
            f"{model.checkpoint.path}: {kind} with bidirectional attention is not supported by {FORMAT} yet; it writes "
            "decoders that see the past only"
        )
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    scalar = getattr(config, "query_pre_attn_scalar", None)
    return Architecture(
        model_type=kind,
        family=FAMILIES[kind],
        layers=tuple(_layer(config, index, head_dim) for index in range(config.num_hidden_layers)),
        hidden_size=hidden,
        intermediate_size=config.intermediate_size,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        vocab_size=model.vocab_size,
        max_positions=config.max_position_embeddings,
        norm_eps=float(config.rms_norm_eps),
        activation=_activation(config),
        attention_scale=float(scalar if scalar is not None else head_dim) ** -0.5,
        attention_softcap=getattr(config, "attn_logit_softcapping", None),
        logit_softcap=getattr(config, "final_logit_softcapping", None),
        tied=bool(config.tie_word_embeddings),
    )


def _activation(config: Any) -> Activation:
    # Gemma 2 and 3 read another key than the rest; a config may hold both
    name = config.hidden_activation if FAMILIES[config.model_type].post_norms else config.hidden_act
    if name not in _ACTIVATIONS:
        raise UnsupportedError(
            f"activation {name!r} is not supported by {FORMAT} yet; it writes {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _layer(config: Any, index: int, head_dim: int) -> Layer:
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is not None:
        if kinds[index] not in ("full_attention", "sliding_attention"):
            raise UnsupportedError(f"layer {index}: {kinds[index]} is not supported by {FORMAT} yet")
        window = window if kinds[index] == "sliding_attention" else None
    parameters = config.rope_parameters
    if kinds is not None and kinds[index] in parameters:
        parameters = parameters[kinds[index]]
    return Layer(rope=_rope(parameters, head_dim), window=window)


def _rope(parameters: Mapping[str, Any], head_dim: int) -> Rope:
    kind = parameters.get("rope_type", "default")
    dims = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    theta = float(parameters["rope_theta"])
    if kind == "default":
        return Rope(theta=theta, dims=dims)
    if kind == "linear":
        return Rope(theta=theta, dims=dims, kind="linear", factor=float(parameters["factor"]))
    if kind == "llama3":
        return Rope(
            theta=theta,
            dims=dims,
            kind="llama3",
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_context=int(parameters["original_max_position_embeddings"]),
        )
    raise UnsupportedError(
        f"rotary scaling {kind!r} is not supported by {FORMAT} yet; it writes default, linear and llama3"
    )
