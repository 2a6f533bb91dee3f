"""What each layer of a model becomes: its weight's scheme, its inputs' quantizer, or neither.

A stage makes a plan, a format writes it into config.json and reads it back, and every forward follows it. Nothing
else says which layer is quantized how.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from compress.errors import ConfigError
from compress.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class ActivationScheme:
    """Uniform integer quantization of a linear's inputs `[tokens, in_features]`: `x ~= (q - zero_point) * scale`.

    dynamic: one scale a token, taken from the token when it comes; else one for the whole tensor, found by calibration
    and stored. Codes are unsigned as a weight's are, with the symmetric zero point in the middle.
    """

    num_bits: int = 8
    symmetric: bool = True
    dynamic: bool = True

    def __post_init__(self) -> None:
        if self.num_bits != 8:
            raise ConfigError(
                f"activations of {self.num_bits} bits are not computed; choose 8, or leave them as floats"
            )

    @property
    def strategy(self) -> str:
        """`"token"` or `"tensor"`, as compressed-tensors names it."""
        return "token" if self.dynamic else "tensor"

    def label(self) -> str:
        """Short name: `a8`, `a8-asym`, `a8-static`."""
        return f"a{self.num_bits}{'' if self.symmetric else '-asym'}{'' if self.dynamic else '-static'}"

    def to_json(self) -> dict[str, Any]:
        return {
            "num_bits": self.num_bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": self.strategy,
            "dynamic": self.dynamic,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ActivationScheme:
        """The inverse of `to_json`; ConfigError for a value that is none."""
        found = _fields(value, {"num_bits": int, "symmetric": bool, "dynamic": bool}, "activation scheme")
        return cls(**found)


@dataclass(frozen=True, kw_only=True)
class KvScheme:
    """Keys and values in INT8, one scale for each token and head, found when they enter the cache.

    `scale = max(amax / 127, 1e-6)`, rounded to nearest: what vLLM calls `int8_per_token_head`. Nothing of it is stored
    in a checkpoint; it says how the model is to be served and judged.
    """

    num_bits: int = 8

    def __post_init__(self) -> None:
        if self.num_bits != 8:
            raise ConfigError(f"a KV cache of {self.num_bits} bits is not computed; choose 8, or leave it in float16")

    def label(self) -> str:
        """As vLLM's `--kv-cache-dtype` names it."""
        return f"int{self.num_bits}_per_token_head"

    def to_json(self) -> dict[str, Any]:
        return {
            "num_bits": self.num_bits,
            "type": "int",
            "symmetric": True,
            "strategy": "token_head",
            "dynamic": True,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> KvScheme:
        """The inverse of `to_json`; ConfigError for a value that is none."""
        if value.get("strategy") != "token_head" or value.get("symmetric") is not True:
            raise ConfigError(f"KV scheme {dict(value)} is not symmetric per token and head, the only one computed")
        return cls(**_fields(value, {"num_bits": int}, "KV scheme"))


@dataclass(frozen=True, kw_only=True)
class LayerScheme:
    """What a linear becomes. weight None: stays in floating point; input None: computes with the inputs as they are."""

    weight: Scheme | None = None
    input: ActivationScheme | None = None

    @property
    def is_dense(self) -> bool:
        """Whether the layer stays as it is."""
        return self.weight is None and self.input is None

    def label(self) -> str:
        """Short name as used in file names: `w4g128`, `w8-sym-a8`, `dense`."""
        parts = [part.label() for part in (self.weight, self.input) if part is not None]
        return "-".join(parts) or "dense"

    def to_json(self) -> dict[str, Any]:
        return {
            "weight": None if self.weight is None else self.weight.to_json(),
            "input": None if self.input is None else self.input.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LayerScheme:
        """The inverse of `to_json`; ConfigError for a value that is none."""
        weight, inputs = value.get("weight"), value.get("input")
        return cls(
            weight=None if weight is None else Scheme.from_json(weight),
            input=None if inputs is None else ActivationScheme.from_json(inputs),
        )


DENSE = LayerScheme()


def outside_blocks(name: str) -> bool:
    """Whether a linear belongs to no block: blocks are numbered, `lm_head` and `embed_out` are not."""
    return not any(part.isdigit() for part in name.split("."))


@dataclass(frozen=True)
class LayerPlan(Mapping[str, LayerScheme]):
    """Full name of a linear -> what it becomes; immutable, in the order of the model. kv: of the cache, or None.

    A layer that is not in the plan is not quantized. Plans are made whole (`uniform`, `dense`) and changed by pattern
    (`with_layers`).
    """

    layers: Mapping[str, LayerScheme] = field(default_factory=dict)
    kv: KvScheme | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))

    def __getitem__(self, name: str) -> LayerScheme:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __hash__(self) -> int:
        return hash((tuple(self.layers.items()), self.kv))

    @classmethod
    def dense(cls, names: Iterable[str], *, kv: KvScheme | None = None) -> LayerPlan:
        """Every layer stays as it is."""
        return cls(dict.fromkeys(names, DENSE), kv)

    @classmethod
    def uniform(
        cls, names: Iterable[str], scheme: LayerScheme, *, skip: Sequence[str] = (), kv: KvScheme | None = None
    ) -> LayerPlan:
        """Every layer in `scheme` but those that a pattern of `skip` names, which stay dense.

        ConfigError when a pattern matches no layer, or all of them are skipped.
        """
        plan = cls(dict.fromkeys(names, scheme), kv)
        for pattern in skip:
            plan = plan.with_layers(pattern, DENSE, option="--skip")
        if len(plan) and not plan.quantized:
            raise ConfigError(f"--skip leaves nothing to quantize: it matches all {len(plan)} layers of the blocks")
        return plan

    def with_layers(self, pattern: str, scheme: LayerScheme, *, option: str = "pattern") -> LayerPlan:
        """The plan with every layer that `pattern` names (see `matches`) in `scheme`.

        ConfigError, naming the command line's `option`, when there is none.
        """
        named = [name for name in self.layers if matches(name, pattern)]
        if not named:
            example = next(iter(self.layers), None)
            like = f"layers are called like {example}" if example else "there are no layers"
            raise ConfigError(f"{option} {pattern} matches no layer; {like}, and a pattern names whole parts of that")
        return LayerPlan({**self.layers, **dict.fromkeys(named, scheme)}, self.kv)

    @property
    def quantized(self) -> tuple[str, ...]:
        """Layers whose weight or inputs are quantized."""
        return tuple(name for name, scheme in self.layers.items() if not scheme.is_dense)

    @property
    def left_dense(self) -> tuple[str, ...]:
        """Layers that stay as they are."""
        return tuple(name for name, scheme in self.layers.items() if scheme.is_dense)

    def groups(self) -> dict[LayerScheme, tuple[str, ...]]:
        """The quantized layers by scheme, in order of first appearance."""
        out: dict[LayerScheme, list[str]] = {}
        for name in self.quantized:
            out.setdefault(self.layers[name], []).append(name)
        return {scheme: tuple(names) for scheme, names in out.items()}

    def only(self) -> LayerScheme:
        """The scheme that all quantized layers share. ConfigError when there are several, or none."""
        groups = self.groups()
        if len(groups) != 1:
            found = ", ".join(scheme.label() for scheme in groups) or "none"
            raise ConfigError(f"one scheme for all quantized layers is needed, and the plan has {found}")
        return next(iter(groups))

    def to_json(self) -> dict[str, Any]:
        """JSON that `from_json` reads back: the schemes, and for each layer which of them it has."""
        schemes = list(dict.fromkeys(self.layers.values()))
        return {
            "kv": None if self.kv is None else self.kv.to_json(),
            "schemes": [scheme.to_json() for scheme in schemes],
            "layers": {name: schemes.index(scheme) for name, scheme in self.layers.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LayerPlan:
        """The inverse of `to_json`; ConfigError for a value that is none."""
        try:
            schemes = [LayerScheme.from_json(scheme) for scheme in value["schemes"]]
            kv = None if value["kv"] is None else KvScheme.from_json(value["kv"])
            return cls({str(name): schemes[index] for name, index in value["layers"].items()}, kv)
        except (KeyError, IndexError, TypeError, AttributeError) as e:
            raise ConfigError(f"a layer plan cannot be read ({type(e).__name__}: {e}); make it again") from None


def matches(name: str, pattern: str) -> bool:
    """Whether a glob pattern names a layer by whole dotted parts: all of its full name, or a run of its parts.

    `layers.1` names what lies in `model.layers.1` and nothing of `model.layers.10`; `*` also crosses dots.
    """
    parts = name.split(".")
    runs = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
    return any(fnmatch.fnmatchcase(run, pattern) for run in runs)


def _fields(value: Mapping[str, Any], kinds: Mapping[str, type], what: str) -> dict[str, Any]:
    for key, kind in kinds.items():
        if type(value.get(key)) is not kind:
            raise ConfigError(f"{what}: {key}={value.get(key)!r} is not of type {kind.__name__}")
    return {key: value[key] for key in kinds}
