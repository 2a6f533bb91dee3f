"""What each linear of a model may become when bits are to be spent where they count, and what that takes in a file.

vLLM takes integer weights of 4 bits in groups of 32, 64 or 128, with zero points or without, and of 8 bits without
(`compressed_tensors_wNa16.py`). Zero points are worth more than the bits that they take: on the reference model groups
of 32 without them (4.5 bits) lose more than groups of 64 with them (4.31 bits), KL 0.028 and 0.026. But transformers
5.23 with compressed-tensors 0.20 fails to load packed zero points, whose shape it does not expect: hence `symmetric`.
Linears that share an input are computed as one matrix (q, k, v; gate and up), so they are chosen together. Embeddings
stay in float16; the output matrix does unless it is asked for, since SGLang before August 2026 answers garbage without
an error (vllm PR 37291, sglang PR 35228, issue 35358): `head` says which readers take what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compress.errors import UnsupportedError
from compress.plan import DENSE, LayerScheme
from compress.scheme import GROUP_SIZES, Scheme

Shape = tuple[int, int]
_SCALE_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class Menu:
    """Which kinds of schemes there are to choose from.

    int4: group sizes of 4-bit weights. symmetric: without zero points. int8: weights of 8 bits too. dense: float16 too.
    lm_head: the output matrix is chosen for as well, where it is a tensor of its own.
    """

    int4: tuple[int, ...] = GROUP_SIZES
    symmetric: bool = False
    int8: bool = True
    dense: bool = True
    lm_head: bool = False

    def options(self, in_features: int) -> list[LayerScheme]:
        """What linears with so many inputs may become, smallest first; of 8 bits with the largest group that divides.

        UnsupportedError where nothing of the menu can hold them.
        """
        sizes = [g for g in sorted(self.int4, reverse=True) if in_features % g == 0]
        found = [Scheme(group_size=g, symmetric=self.symmetric) for g in sizes]
        eight = next((g for g in GROUP_SIZES if in_features % g == 0), None)
        if self.int8 and eight is not None:
            found.append(Scheme(num_bits=8, group_size=eight, symmetric=True))
        out = [LayerScheme(weight=scheme) for scheme in found] + ([DENSE] if self.dense else [])
        if not out:
            asked = ", ".join(map(str, self.int4))
            raise UnsupportedError(
                f"linears of {in_features} inputs have no groups of {asked}, and nothing else may be chosen; leave "
                "them in float16 with --skip"
            )
        return out


def label(scheme: LayerScheme) -> str:
    """As manifests and reports call an option: `w4g64`, `w8g128-sym`, `float16`."""
    return "float16" if scheme.is_dense else scheme.label()


def kind(scheme: LayerScheme) -> str:
    """The same for whole models: 8 bits are `w8`, whatever groups they come in."""
    return "w8" if scheme.weight is not None and scheme.weight.num_bits == 8 else label(scheme)


def num_bytes(scheme: LayerScheme, shape: Shape) -> int:
    """Bytes of one linear's tensors in a compressed-tensors folder, without its bias."""
    rows, columns = shape
    weight = scheme.weight
    if weight is None:
        return _SCALE_BYTES * rows * columns
    groups = weight.groups(columns)
    packed = 4 * rows * -(-columns * weight.num_bits // 32)
    zero_points = 0 if weight.symmetric else 4 * groups * -(-rows * weight.num_bits // 32)
    return packed + _SCALE_BYTES * rows * groups + zero_points + 2 * 8  # weight_shape: two int64


def group_bytes(scheme: LayerScheme, layers: Sequence[str], shapes: Mapping[str, Shape]) -> int:
    """The same of several linears."""
    return sum(num_bytes(scheme, shapes[name]) for name in layers)
