"""The five numbers that pruning changes, where a config keeps them, and how many parameters a shape has.

Uniform shapes only: one width for all blocks. transformers, vLLM and SGLang build a model from one config, and refuse
or silently ignore widths by layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from compress.errors import ConfigError, UnsupportedError, reason
from compress.model import StreamedModel

# Names of config.json's figures, in the order in which they are looked for.
_KEYS = {
    "blocks": ("num_hidden_layers", "n_layer", "num_layers"),
    "intermediate": ("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "hidden": ("hidden_size", "n_embd"),
}
# What the quantizers' groups and the kernels' tiles want a width to be a multiple of.
MULTIPLE = {"intermediate": 256, "hidden": 128}
SMALLEST_MULTIPLE = 32


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Decoder blocks, neurons of an MLP, query heads, key-value heads, channels of the hidden state."""

    blocks: int
    intermediate: int
    heads: int
    kv_heads: int
    hidden: int

    def label(self) -> str:
        """Short name, as used in tables and file names: `b24-i1280-h6x3-d512`."""
        return f"b{self.blocks}-i{self.intermediate}-h{self.heads}x{self.kv_heads}-d{self.hidden}"

    def to_json(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Shape:
        return cls(**{f.name: int(value[f.name]) for f in fields(cls)})


def shape_of(model: StreamedModel) -> Shape:
    """The shape of an open model. UnsupportedError when its config does not tell it."""
    config = model.checkpoint.config
    found: dict[str, int] = {}
    for name in _KEYS:
        value = _figure(model.model.config, name)
        if value is None and name == "kv_heads":
            value = found["heads"]
        if value is None and name == "intermediate":
            value = 0  # GPT-2 leaves it out; then the width cannot be cut, and is not asked for
        if value is None:
            raise UnsupportedError(
                f"{model.checkpoint.path}: config.json of type {config.get('model_type')!r} does not give "
                f"{' or '.join(_KEYS[name][:2])}, which pruning changes; only decoders with such a config can be pruned"
            )
        found[name] = value
    if found["blocks"] != model.num_blocks:
        raise UnsupportedError(
            f"{model.checkpoint.path}: config.json counts {found['blocks']} blocks and the model has "
            f"{model.num_blocks}; such a model cannot be pruned"
        )
    return Shape(**found)


def head_dim_of(model: StreamedModel) -> int:
    """Channels of a head: the config's, or the hidden size over the heads."""
    shape = shape_of(model)
    stated = getattr(model.model.config, "head_dim", None)
    return int(stated) if stated else shape.hidden // shape.heads


def _config(model: StreamedModel) -> Any:
    """The model's transformers config."""
    return model.model.config


def _figure(config: Any, name: str) -> int | None:
    value = next((getattr(config, key) for key in _KEYS[name] if getattr(config, key, None)), None)
    return int(value) if isinstance(value, int) else None


# ---- configs of other shapes -------------------------------------------------------------------------


def config_of(model: StreamedModel, shape: Shape, kept: Sequence[int]) -> dict[str, Any]:
    """The source's config.json with another shape; `kept` are the blocks that stay, in order.

    Lists with an entry for each block keep the entries of those blocks. `head_dim` is written out once it is no longer
    the hidden size over the heads.
    """
    config = dict(model.checkpoint.config)
    old = shape_of(model)
    whole = _config(model).to_dict()
    for key, value in whole.items():
        if isinstance(value, list) and len(value) == old.blocks and old.blocks != len(kept) and key != "architectures":
            config[key] = [value[i] for i in kept]
    for name in _KEYS:
        before, after = getattr(old, name), getattr(shape, name)
        if before == after:
            continue
        key = _key(model, name)
        if key is not None:
            config[key] = after
        elif name != "kv_heads":  # which follow from the heads where no config names them
            raise UnsupportedError(
                f"{model.checkpoint.path}: config.json of type {model.checkpoint.config.get('model_type')!r} has no "
                f"{_KEYS[name][0]} that could be made smaller; use --depth"
            )
    if (shape.heads, shape.hidden) != (old.heads, old.hidden):
        config["head_dim"] = head_dim_of(model)
    return config


def _key(model: StreamedModel, name: str) -> str | None:
    for where in (model.checkpoint.config, _config(model).to_dict()):
        for key in _KEYS[name]:
            if where.get(key) is not None:
                return key
    return None


def skeleton(model: StreamedModel, config: Mapping[str, Any]) -> nn.Module:
    """The model that `config` describes, parameters on the meta device."""
    from accelerate import init_empty_weights

    made = type(_config(model)).from_dict({key: value for key, value in config.items() if key != "quantization_config"})
    with init_empty_weights(include_buffers=False):
        module: nn.Module = type(model.model)(made)
    return module.eval()


class Counter:
    """Parameters of any shape of one model: counted on the meta device, one block and what is around it."""

    def __init__(self, model: StreamedModel) -> None:
        self.model = model
        self._known: dict[Shape, tuple[int, int]] = {}

    def parameters(self, shape: Shape) -> int:
        """Numbers stored: a tied output matrix counts once."""
        outside, block = self.parts(shape)
        return outside + shape.blocks * block

    def config(self, shape: Shape) -> dict[str, Any]:
        """The config.json of a shape, whichever blocks stay."""
        return config_of(self.model, shape, range(shape.blocks))

    def check(self, shape: Shape) -> None:
        """UnsupportedError for a shape that transformers builds no model of this family from."""
        try:
            self.parts(shape)
        except UnsupportedError:
            raise
        except Exception as e:  # a config's own validation raises what it likes
            kind = self.model.checkpoint.config.get("model_type")
            raise UnsupportedError(
                f"{self.model.checkpoint.path}: transformers builds no {kind} of {shape.label()} ({reason(e)}); "
                "remove another number of heads, or of hidden channels"
            ) from e

    def builds(self, shape: Shape) -> bool:
        """Whether transformers builds a model of that shape."""
        try:
            self.check(shape)
        except UnsupportedError:
            return False
        return True

    def parts(self, shape: Shape) -> tuple[int, int]:
        """Parameters around the blocks, and of one block."""
        widths = replace(shape, blocks=1)
        if widths not in self._known:
            model = skeleton(self.model, config_of(self.model, widths, [0]))
            prefix = f"{self.model.blocks_name}."
            sizes = {name: math.prod(value.shape) for name, value in stored_parameters(model).items()}
            block = sum(size for name, size in sizes.items() if name.startswith(prefix))
            self._known[widths] = (sum(sizes.values()) - block, block)
        return self._known[widths]


def stored_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name, without a tied output matrix."""
    out = dict(model.named_parameters())
    if getattr(model.config, "tie_word_embeddings", False):
        names = {id(module): name for name, module in model.named_modules()}
        head = model.get_output_embeddings()  # type: ignore[operator]
        if head is not None and head is not model.get_input_embeddings():  # type: ignore[operator]
            out.pop(f"{names[id(head)]}.weight", None)
    return out


# ---- what the user asks for --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How much of something goes: `count` of it, or a `share` between 0 and 1; `text` as it was written."""

    text: str
    count: int | None = None
    share: float | None = None

    def of(self, total: int) -> float:
        """How many of `total` go."""
        return float(self.count) if self.count is not None else total * float(self.share or 0.0)


def amount(text: str, option: str) -> Amount:
    """`4` is four of them, `0.25` a quarter. ConfigError for what is neither."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if 0 <= value < 1:
        return Amount(text=text, share=value)
    if value >= 1 and value == int(value):
        return Amount(text=text, count=int(value))
    raise ConfigError(f"{option} {text} is neither a share below 1, such as 0.25, nor a whole number to remove")


def asked_shape(
    old: Shape,
    *,
    depth: str | None = None,
    intermediate: str | None = None,
    heads: str | None = None,
    kv_heads: str | None = None,
    hidden: str | None = None,
) -> Shape:
    """The shape that is left when as much is removed as the options say. ConfigError for what cannot be.

    Widths go down to the nearest multiple that their quantizers need.
    """
    new = old
    if depth is not None:
        gone = round(amount(depth, "--depth").of(old.blocks))
        if gone >= old.blocks:
            raise ConfigError(
                f"--depth {depth} would remove {gone} of {old.blocks} blocks, and at least one must stay; --depth "
                f"{old.blocks - 1} is the most"
            )
        new = replace(new, blocks=old.blocks - gone)
    if intermediate is not None:
        new = replace(new, intermediate=_narrower("intermediate", old.intermediate, intermediate))
    if hidden is not None:
        new = replace(new, hidden=_narrower("hidden", old.hidden, hidden))
    if heads is not None:
        new = _fewer_heads(new, old, heads)
    if kv_heads is not None:
        new = _fewer_groups(new, old, kv_heads)
    return new


def multiple_of(name: str, width: int) -> int:
    """What a smaller width must be a multiple of: the quantizers' number, halved while the original has few of it."""
    step = MULTIPLE[name]
    while step > SMALLEST_MULTIPLE and width < 3 * step:
        step //= 2
    return step


def _narrower(name: str, width: int, text: str) -> int:
    option = f"--{name}"
    if not width:
        raise UnsupportedError(f"{option} {text}: the model's config names no such width; use --depth")
    step = multiple_of(name, width)
    left = width - amount(text, option).of(width)
    new = round(left / step) * step
    if new < step:
        raise ConfigError(f"{option} {text} would leave {left:g} of {width}; at least {step} must stay")
    if new == width and left != width:
        raise ConfigError(
            f"{option} {text} would leave {left:g} of {width}, which as a multiple of {step} is all of it; remove at "
            f"least {step / width:.2g}"
        )
    return new


def _fewer_heads(new: Shape, old: Shape, text: str) -> Shape:
    """Query heads go evenly from every key-value group."""
    left = old.heads - amount(text, "--heads").of(old.heads)
    if old.heads == old.kv_heads:  # every head is a group of its own
        return _fewer_groups(new, old, text, "--heads")
    allowed = [n for n in range(old.kv_heads, old.heads + 1, old.kv_heads) if old.heads % old.kv_heads == 0]
    nearest = min(allowed, key=lambda n: abs(n - left), default=old.heads)
    if abs(nearest - left) > 0.02 * old.heads:
        choices = ", ".join(f"{(old.heads - n) / old.heads:.3g}" for n in reversed(allowed) if n < old.heads)
        raise ConfigError(
            f"--heads {text} would leave {left:g} of {old.heads} heads, which {old.kv_heads} key-value heads do not "
            f"divide; {'choose from ' + choices if choices else 'use --kv-heads'}"
        )
    return replace(new, heads=nearest)


def _fewer_groups(new: Shape, old: Shape, text: str, option: str = "--kv-heads") -> Shape:
    """Whole key-value groups go, with their query heads."""
    left = old.kv_heads - amount(text, option).of(old.kv_heads)
    nearest = round(left)
    if abs(nearest - left) > 0.02 * old.kv_heads or not 1 <= nearest <= old.kv_heads:
        choices = ", ".join(f"{(old.kv_heads - n) / old.kv_heads:.3g}" for n in range(old.kv_heads - 1, 0, -1))
        raise ConfigError(
            f"{option} {text} would leave {left:g} of {old.kv_heads} key-value heads; "
            f"{'choose from ' + choices if choices else 'there is only one'}"
        )
    return replace(new, kv_heads=nearest, heads=new.heads // old.kv_heads * nearest)
