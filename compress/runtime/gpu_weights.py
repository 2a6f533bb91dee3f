"""A model folder as `gpu_decoder` takes it: codes stay codes, q, k, v and gate, up become one linear each.

Which modules play which part is read off the model's own names; that the decoder then computes the model is not
believed but proven, on a few tokens, before it is handed out.

Shapes: H hidden size, A query heads, C key heads, D size of a head, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress import activations
from compress.dense import read_dense
from compress.errors import ArtifactError, UnsupportedError
from compress.model import StreamedModel
from compress.plan import ActivationScheme
from compress.runtime.gpu_decoder import BY_TOKEN, GpuDecoder, LayerWeights, Weights
from compress.runtime.kernels import weight_only
from compress.runtime.kernels.decode import Heads
from compress.runtime.kernels.weight_only import Packed

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
PROOF_TOKENS = 24
# float16 activations against the streamed model's float32; a wrong weight or rotation is off by more than 0.1.
TOLERANCE = 2e-2
# Two roundings of the same inputs that are independent of each other differ by 1.4 times what one of them changes.
OF_NOISE = 1.5


def open_decoder(
    folder: Path, *, capacity: int, batch: int = 1, device: str = "cuda", graphs: bool = True
) -> GpuDecoder:
    """A decoder of the folder's model with room for `capacity` tokens a sequence.

    UnsupportedError names what these kernels do not compute; ArtifactError when the decoder does not reproduce the
    model.
    """
    model = StreamedModel.open(folder)
    _refuse(model, capacity)
    weights = read_weights(model, torch.device(device), capacity)
    _prove(model, weights, min(batch, 2))
    return GpuDecoder(weights, capacity=capacity, batch=batch, graphs=graphs)


def _refuse(model: StreamedModel, capacity: int) -> None:
    config: Any = model.model.config
    path, kind = model.checkpoint.path, config.model_type
    positions = int(getattr(config, "max_position_embeddings", capacity))
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    reason = None
    if kind not in FAMILIES:
        reason = f"{kind} is not among {', '.join(FAMILIES)}"
    elif config.hidden_act != "silu":
        reason = f"its activation is {config.hidden_act}, not silu"
    elif window and window < capacity:
        reason = f"it sees {window} tokens back and the cache holds {capacity}"
    elif capacity > positions:
        reason = f"it was made for {positions} tokens and {capacity} are asked for"
    elif _head_size(config) % 64:
        reason = f"its heads have {_head_size(config)} values, not a multiple of 64"
    elif (other := _other_inputs(model)) is not None:
        reason = f"its activations are {other}, and the kernels have {' and '.join(s.label() for s in BY_TOKEN)} only"
    elif model.kv is not None:
        reason = "its KV cache is INT8"
    if reason:
        raise UnsupportedError(f"{path}: the GPU decoder does not run it, because {reason}; use --runtime torch")


def _other_inputs(model: StreamedModel) -> str | None:
    """An input quantizer that the kernels do not have, if any."""
    inputs = [model.stored.scheme(layer).input for layer in model.stored.layers]
    return next((i.label() for i in inputs if i is not None and i not in BY_TOKEN), None)


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def read_weights(model: StreamedModel, device: torch.device, capacity: int) -> Weights:
    """Every weight, packed on the device; one block's codes are on their way at a time."""
    config: Any = model.model.config
    heads = Heads(
        query=config.num_attention_heads,
        key=config.num_key_value_heads,
        size=_head_size(config),
        scale=float(_head_size(config) ** -0.5),
    )
    layers = [_layer(model, f"{model.blocks_name}.{i}", device) for i in range(model.num_blocks)]
    base: Any = model.base
    whole: Any = model.model
    names = {id(module): name for name, module in whole.named_modules()}
    embedding = _dense(model, f"{names[id(base.get_input_embeddings())]}.weight", device)
    head = _packed(model, [names[id(whole.get_output_embeddings())]], device)  # in integers where `auto` chose them
    norm = _dense(model, f"{model.blocks_name.rsplit('.', 1)[0]}.norm.weight", device).float()
    cosines, sines = _tables(model, capacity, heads.size, device)
    return Weights(
        embedding=embedding,
        layers=layers,
        norm=norm,
        head=head,
        cosines=cosines,
        sines=sines,
        heads=heads,
        eps=float(config.rms_norm_eps),
    )


def _layer(model: StreamedModel, prefix: str, device: torch.device) -> LayerWeights:
    block: nn.Module = model.model.get_submodule(prefix)
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    has = {name for name, _ in block.named_parameters()}

    def norm(name: str) -> Tensor | None:
        found = f"{name}.weight" in has
        return _dense(model, f"{prefix}.{name}.weight", device).float() if found else None

    def bias(names: Sequence[str]) -> Tensor | None:
        present = [f"{prefix}.{n}.bias" for n in names if f"{n}.bias" in has]
        return torch.cat([_dense(model, n, device) for n in present]) if present else None

    first, second = norm("input_layernorm"), norm("post_attention_layernorm")
    assert first is not None and second is not None
    qkv = [f"self_attn.{c}_proj" for c in "qkv"]
    parts = {
        "qkv": [f"{prefix}.{n}" for n in qkv],
        "o": [f"{attention}.o_proj"],
        "gate_up": [f"{mlp}.gate_proj", f"{mlp}.up_proj"],
        "down": [f"{mlp}.down_proj"],
    }
    return LayerWeights(
        input_norm=first,
        qkv=_packed(model, parts["qkv"], device),
        qkv_bias=bias(qkv),
        q_norm=norm("self_attn.q_norm"),
        k_norm=norm("self_attn.k_norm"),
        o=_packed(model, parts["o"], device),
        o_bias=bias(["self_attn.o_proj"]),
        post_norm=second,
        gate_up=_packed(model, parts["gate_up"], device, gated=True),
        down=_packed(model, parts["down"], device),
        rounded={part: scheme for part, names in parts.items() if (scheme := _rounds(model, names)) is not None},
    )


def _rounds(model: StreamedModel, names: Sequence[str]) -> ActivationScheme | None:
    """How the layers of one input quantize it, if they do. UnsupportedError where they do not all do the same."""
    sources = [model.source_name(f"{name}.weight", suffix=".weight") for name in names]
    found = {model.stored.scheme(s).input if s in model.stored else None for s in sources}
    if len(found) > 1:
        raise UnsupportedError(
            f"{model.checkpoint.path}: of {', '.join(names)}, which read one input, some quantize it otherwise; "
            "use --runtime torch"
        )
    return found.pop()


def _packed(model: StreamedModel, names: Sequence[str], device: torch.device, *, gated: bool = False) -> Packed:
    """Layers of one input as one weight. Of different schemes they are decoded to 16 bits, which loses nothing."""
    sources = [model.source_name(f"{name}.weight", suffix=".weight") for name in names]
    join = weight_only.interleaved if gated else _below
    schemes = {model.stored.scheme(s).weight if s in model.stored else None for s in sources}
    scheme = schemes.pop()
    if schemes or scheme is None or scheme.num_bits not in (4, 8) or 0 < scheme.group_size and scheme.group_size % 32:
        return weight_only.pack_dense(join(*(_dense(model, f"{name}.weight", device) for name in names)))
    found = [model.stored.weight(s) for s in sources]
    codes = join(*(w.codes_OI.to(device) for w in found))
    scale = join(*(w.scale_OG.to(device, torch.float16) for w in found))
    zero = join(*(w.zero_point_OG.to(device) for w in found))
    return weight_only.pack(codes, scale, zero, scheme.num_bits)


def _below(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _dense(model: StreamedModel, name: str, device: torch.device) -> Tensor:
    source = model.source_name(name)
    value = read_dense(model.stored, [source])[source].to(device)
    if not bool(torch.isfinite(value).all()) or float(value.abs().max()) > 65504:
        raise ArtifactError(f"{model.checkpoint.path}: {name} has values that float16 cannot hold; use --runtime torch")
    return value.to(torch.float16)


def _tables(model: StreamedModel, capacity: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines as the model's own rotary module makes them, float32 `[capacity, D / 2]`."""
    rotary = model.base.rotary_emb
    assert isinstance(rotary, nn.Module)
    cosines, sines = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(capacity)[None])
    if cosines.shape[-1] != size:
        raise UnsupportedError(
            f"{model.checkpoint.path}: {cosines.shape[-1]} of a head's {size} values are rotated; use --runtime torch"
        )
    both = [t[0, :, : size // 2].float().contiguous().to(device) for t in (cosines, sines)]
    return both[0], both[1]


def _prove(model: StreamedModel, weights: Weights, batch: int) -> None:
    """Run a few tokens through the streamed model and through the kernels, the second half token by token.

    batch: 1 or 2, since one sequence goes through other kernels than several.

    Where inputs are INT8, the weights are proven without rounding any, then the rounding: float16 moves values over the
    middle between two codes, so that the two may differ by as much as rounding itself changes (`OF_NOISE`).
    """
    length = min(PROOF_TOKENS, len(weights.cosines))
    ids = torch.arange(length)[None] * 7919 % model.vocab_size
    wanted = _streamed(model, ids, plain=False)
    if not any(layer.rounded for layer in weights.layers):
        _compare(model, _decoded(weights, ids, batch), wanted, TOLERANCE)
        return
    plain = _streamed(model, ids, plain=True)
    whole = replace(weights, layers=[replace(layer, rounded={}) for layer in weights.layers])
    _compare(model, _decoded(whole, ids, batch), plain, TOLERANCE)
    noise = float((wanted - plain).norm() / plain.norm())
    try:
        _compare(model, _decoded(weights, ids, batch), wanted, max(TOLERANCE, OF_NOISE * noise))
    except ArtifactError as e:  # the weights are right: transformers' forward runs them
        raise UnsupportedError(str(e)) from e


@torch.no_grad()
def _streamed(model: StreamedModel, ids: Tensor, *, plain: bool) -> Tensor:
    """The streamed model's last logits `[V]`; plain: without quantizing any inputs."""
    hidden = model.embed(ids)
    for index in range(model.num_blocks):
        block = model.load_block(index)
        for module in block.modules() if plain else ():
            activations.uninstall(module)
        hidden = model.run_block(index, hidden)
        model.release_block(index)
    return model.head(hidden[:, -1:])[0, 0].float()


def _decoded(weights: Weights, ids: Tensor, batch: int) -> Tensor:
    """The kernels' last logits `[V]`: half of the ids at once, then one by one; all sequences alike."""
    length = ids.shape[1]
    decoder = GpuDecoder(weights, capacity=length, batch=batch, graphs=False)
    ids = ids.to(weights.embedding.device).expand(batch, -1)
    decoder.prefill(ids[:, : length // 2])
    for t in range(length // 2, length):
        found = decoder.step(ids[:, t])[0].float().cpu()
    return found


def _compare(model: StreamedModel, found: Tensor, wanted: Tensor, tolerance: float) -> None:
    error = float((found - wanted).norm() / wanted.norm())
    if not error < tolerance:
        raise ArtifactError(
            f"{model.checkpoint.path}: the GPU decoder's logits differ from the model's by {error:.2g} of their size, "
            f"and float16 explains {tolerance:.2g}; use --runtime torch"
        )
