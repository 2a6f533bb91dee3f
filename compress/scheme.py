"""The numeric format of a quantized weight, in the vocabulary of compressed-tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from compress.errors import ConfigError

# Group sizes that every reader of grouped INT4 takes, the usual one first.
GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Uniform integer quantization of a weight `[out_features, in_features]` in groups along `in_features`.

    Codes are unsigned, `0 <= q <= 2**num_bits - 1`, and `w ~= (q - zero_point) * scale`. A symmetric
    scheme fixes every zero point at `2**(num_bits - 1)` (8 for INT4), so the codes cover
    `[-2**(num_bits-1), 2**(num_bits-1) - 1]`. `group_size=-1` means one group a row (`strategy="channel"`).
    """

    num_bits: int = 4
    group_size: int = 128
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.num_bits <= 8:
            raise ConfigError(f"num_bits={self.num_bits} is outside 2..8, the bits that codes can have; choose 4")
        if self.group_size != -1 and self.group_size < 8:
            raise ConfigError(
                f"group_size={self.group_size} is less than 8, the smallest that is written; choose 32, 64 or 128"
            )

    @property
    def strategy(self) -> str:
        """`"channel"` or `"group"`, as compressed-tensors names it."""
        return "channel" if self.group_size == -1 else "group"

    @property
    def max_code(self) -> int:
        """Largest code, `2**num_bits - 1`."""
        return int(2**self.num_bits) - 1

    @property
    def symmetric_zero_point(self) -> int:
        """The zero point of every group when `symmetric`."""
        return int(2 ** (self.num_bits - 1))

    def groups(self, in_features: int, name: str = "layer") -> int:
        """Number of groups along `in_features`. Raises ConfigError when they do not divide it."""
        size = in_features if self.group_size == -1 else self.group_size
        if in_features % size:
            raise ConfigError(
                f"{name}: in_features={in_features} is not a multiple of group_size={size}; "
                f"choose a --group-size that divides it or list the layer in --skip"
            )
        return in_features // size

    def label(self) -> str:
        """Short name as used in file names: `w4g128`, `w4g128-sym`, `w8`."""
        group = "" if self.group_size == -1 else f"g{self.group_size}"
        return f"w{self.num_bits}{group}{'-sym' if self.symmetric else ''}"

    def to_json(self) -> dict[str, Any]:
        return {
            "num_bits": self.num_bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": self.strategy,
            "group_size": self.group_size,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Scheme:
        """The inverse of `to_json`. Raises ConfigError for a value that is none."""
        found = [value.get(key) for key in ("num_bits", "group_size", "symmetric")]
        if [type(v) for v in found] != [int, int, bool] or value.get("type", "int") != "int":
            raise ConfigError(
                f"{dict(value)} is not a scheme: num_bits, group_size and symmetric of type int are needed"
            )
        return cls(num_bits=value["num_bits"], group_size=value["group_size"], symmetric=value["symmetric"])


def dividing(sizes: Iterable[int]) -> list[int]:
    """Those of `GROUP_SIZES` that divide all of `sizes`."""
    known = set(sizes)
    return [group for group in GROUP_SIZES if all(size % group == 0 for size in known)]
