"""compressed-tensors' integer layouts, `pack-quantized` and `int-quantized`.

For a linear with weight `[O, I]` in G groups (G = 1 for one scale a row):

    pack-quantized   weight_packed      int32  [O, ceil(I * num_bits / 32)]   codes, see `dense_words`
                     weight_scale       float  [O, G]      in the model's dtype
                     weight_zero_point  int32  [ceil(O * num_bits / 32), G]   packed along O; asymmetric only
                     weight_shape       int64  [2]
    int-quantized    weight             int8   [O, I]      codes less 2**(num_bits - 1)
                     weight_scale       float  [O, G]
                     weight_zero_point  int8   [O, G]      less 2**(num_bits - 1); asymmetric only
                     input_scale        float  [1]         inputs per tensor only
                     input_zero_point   int8   [1]         less 128; asymmetric inputs per tensor only

A layer whose inputs are quantized is int-quantized, any other pack-quantized. Which scheme a layer has is said by
`config_groups`: each group has targets, and of those that name a layer the most specific decides (`_group_of`). A KV
cache that is to be held in INT8 is stated under a key of our own (`KV_KEY`): it is a matter of serving.

Source: compressed-tensors 0.20, `compressors/`, `quantization/quant_config.py`, `utils/match.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError, UnsupportedError
from compress.formats import dense_words, second_reader
from compress.formats.format import Shape, check_groups
from compress.plan import ActivationScheme, KvScheme, LayerPlan, LayerScheme, outside_blocks
from compress.quantized import QuantizedWeight, StaticInput
from compress.scheme import Scheme

NAME = "compressed-tensors"
QUANT_METHOD = "compressed-tensors"
PACKED, INT, MIXED = "pack-quantized", "int-quantized", "mixed-precision"
LEAVES = (
    "weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "input_scale", "input_zero_point",
)  # fmt: skip
CODES = ("weight_packed",)
# Leaves that other layouts of compressed-tensors have, and what they would need.
_REFUSED_LEAVES = {
    "weight_g_idx": "columns in another order (actorder)",
    "weight_global_scale": "4-bit floats",
    "input_global_scale": "4-bit floats",
    "output_scale": "quantized outputs",
    "compressed": "sparse weights",
    "bitmask": "sparse weights",
    "q_scale": "a calibrated KV cache",
    "k_scale": "a calibrated KV cache",
    "v_scale": "a calibrated KV cache",
}
_READ_FORMATS = (PACKED, INT, "naive-quantized", MIXED)
# Where our own plan of the KV cache is kept; readers pass over keys that they do not know, and none reads INT8 scales.
KV_KEY = "compress_kv_cache"
# The version of compressed-tensors whose layout this is; what it writes into its own configs.
_VERSION = "0.20.0"


def format_of(scheme: LayerScheme) -> str:
    """The layout that a layer of this scheme is written in."""
    return PACKED if scheme.input is None else INT


# ---- one layer -----------------------------------------------------------------------------------------


def check(plan: LayerPlan, shapes: Mapping[str, Shape]) -> None:
    """See `Format.check`."""
    for name in plan.quantized:
        scheme = plan[name]
        if scheme.weight is None:
            raise UnsupportedError(
                f"{name}: quantized inputs with a weight in floating point are not written; quantize the weight as well"
            )
        if scheme.input is not None and not scheme.weight.symmetric:
            raise UnsupportedError(
                f"{name}: {scheme.label()}: readers of compressed-tensors take quantized inputs with symmetric weights "
                "only; use --sym"
            )
    check_groups(plan, shapes)


def tensors(weight: QuantizedWeight, scheme: LayerScheme, static: StaticInput | None = None) -> dict[str, Tensor]:
    """See `Format.tensors`."""
    num_bits, symmetric = weight.scheme.num_bits, weight.scheme.symmetric
    half = 2 ** (num_bits - 1)
    out = {"weight_scale": weight.scale_OG.contiguous()}
    if format_of(scheme) == PACKED:
        out["weight_packed"] = dense_words.pack(weight.codes_OI, num_bits).contiguous()
        out["weight_shape"] = torch.tensor(weight.codes_OI.shape, dtype=torch.int64)
        if not symmetric:
            out["weight_zero_point"] = (
                dense_words.pack(weight.zero_point_OG.t().contiguous(), num_bits).t().contiguous()
            )
    else:
        out["weight"] = _signed(weight.codes_OI, half)
        if not symmetric:
            out["weight_zero_point"] = _signed(weight.zero_point_OG, half)
    if static is not None:
        assert scheme.input is not None
        out["input_scale"] = static.scale
        if not scheme.input.symmetric:
            out["input_zero_point"] = _signed(static.zero_point, 128)
    return out


def read(parts: Mapping[str, Tensor], scheme: LayerScheme, name: str) -> QuantizedWeight:
    """See `Format.read`. What the tensors are decides the layout, whatever the config calls it."""
    assert scheme.weight is not None
    num_bits, symmetric = scheme.weight.num_bits, scheme.weight.symmetric
    half = 2 ** (num_bits - 1)
    scale = _part(parts, "weight_scale", name)
    if "weight_packed" in parts:
        rows, columns = (int(n) for n in _part(parts, "weight_shape", name))
        wanted = (rows, dense_words.num_words(columns, num_bits))
        _same(name, "weight_packed", tuple(parts["weight_packed"].shape), wanted)
        codes_OI = dense_words.unpack(parts["weight_packed"], num_bits, columns)
    else:
        codes_OI = _unsigned(_part(parts, "weight", name), half)
        rows, columns = codes_OI.shape
    num_groups = scheme.weight.groups(columns, name)
    if scale.numel() == 1 and num_groups == 1:  # one scale for the whole weight
        scale = scale.reshape(1, 1).expand(rows, 1)
    _same(name, "weight_scale", tuple(scale.shape), (rows, num_groups))
    if symmetric:
        zero_point_OG = torch.full((rows, num_groups), half, dtype=torch.uint8)
    else:
        zero_point_OG = _zero_points(parts, name, num_bits, rows, num_groups)
    return QuantizedWeight(
        codes_OI=codes_OI, scale_OG=scale.contiguous(), zero_point_OG=zero_point_OG, scheme=scheme.weight
    )


def _zero_points(parts: Mapping[str, Tensor], name: str, num_bits: int, rows: int, num_groups: int) -> Tensor:
    stored = _part(parts, "weight_zero_point", name)
    if stored.dtype == torch.int32 and "weight_packed" in parts:
        _same(name, "weight_zero_point", tuple(stored.shape), (dense_words.num_words(rows, num_bits), num_groups))
        return dense_words.unpack(stored.t().contiguous(), num_bits, rows).t().contiguous()
    zero_point_OG = _unsigned(stored.reshape(-1, num_groups).expand(rows, num_groups), 2 ** (num_bits - 1))
    return zero_point_OG.contiguous()


def read_static(parts: Mapping[str, Tensor], scheme: LayerScheme, name: str) -> StaticInput | None:
    """See `Format.read_static`."""
    if scheme.input is None or scheme.input.dynamic:
        return None
    scale = _part(parts, "input_scale", name).reshape(1)
    zero_point = torch.full((1,), 128, dtype=torch.uint8)
    if not scheme.input.symmetric:
        zero_point = _unsigned(_part(parts, "input_zero_point", name).reshape(1), 128)
    return StaticInput(scale=scale, zero_point=zero_point)


def read_again(parts: Mapping[str, Tensor], scheme: LayerScheme) -> dict[str, second_reader.Again]:
    """See `Format.read_again`."""
    assert scheme.weight is not None
    num_bits = scheme.weight.num_bits
    half = 1 << (num_bits - 1)
    arrays = {leaf: second_reader.raw(tensor) for leaf, tensor in parts.items()}
    scale_kind, scale_OG = arrays["weight_scale"]
    if "weight_packed" in arrays:
        rows, columns = (int(n) for n in arrays["weight_shape"][1])
        codes_OI = second_reader.unpack_dense(arrays["weight_packed"][1], num_bits, columns)
    else:
        codes_OI = second_reader.shifted(arrays["weight"][1], half)
        rows = len(codes_OI)
    zero_kind, zero_point_OG = arrays.get("weight_zero_point", ("", np.zeros(scale_OG.shape, np.int8)))
    if zero_kind == "torch.int32":
        zero_point_OG = second_reader.unpack_dense(zero_point_OG.T, num_bits, rows).T
    else:
        zero_point_OG = second_reader.shifted(zero_point_OG, half)
    out = {
        "codes": ("torch.uint8", codes_OI),
        "scales": (scale_kind, scale_OG),
        "zero_points": ("torch.uint8", zero_point_OG),
    }
    if "input_scale" in arrays:
        out["input_scale"] = arrays["input_scale"]
        _, zero_point = arrays.get("input_zero_point", ("", np.zeros(1, np.int8)))
        out["input_zero_point"] = ("torch.uint8", second_reader.shifted(zero_point, 128))
    return out


def _signed(codes: Tensor, half: int) -> Tensor:
    return (codes.to(torch.int16) - half).to(torch.int8)


def _unsigned(codes: Tensor, half: int) -> Tensor:
    return (codes.to(torch.int16) + half).to(torch.uint8)


def _part(parts: Mapping[str, Tensor], leaf: str, name: str) -> Tensor:
    if leaf not in parts:
        raise ArtifactError(f"{name}: tensor {name}.{leaf} is missing; the download may be incomplete")
    return parts[leaf]


def _same(name: str, leaf: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise ArtifactError(
            f"{name}: {leaf} has shape {found}, but {wanted} follows from its config and its other tensors; its config "
            "does not match its weights"
        )


# ---- a folder ------------------------------------------------------------------------------------------


def config(plan: LayerPlan) -> dict[str, Any]:
    """See `Format.config`. One group targets every `Linear` but those in `ignore`; several name their layers. An output
    matrix is named always: readers do not take it for a `Linear`."""
    groups = plan.groups()
    formats = sorted({format_of(scheme) for scheme in groups})
    kv = {} if plan.kv is None else {KV_KEY: plan.kv.to_json()}
    return {
        **kv,
        "config_groups": {
            f"group_{number}": _group(
                scheme, ["Linear", *filter(outside_blocks, names)] if len(groups) == 1 else list(names)
            )
            for number, (scheme, names) in enumerate(groups.items())
        },
        "format": formats[0] if len(formats) == 1 else MIXED,
        "global_compression_ratio": None,
        "ignore": list(plan.left_dense),
        "kv_cache_scheme": None,
        "moe_sparsity_config": None,
        "quant_method": QUANT_METHOD,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": _VERSION,
    }


def _group(scheme: LayerScheme, targets: list[str]) -> dict[str, Any]:
    assert scheme.weight is not None
    weight = scheme.weight
    inputs = None
    if scheme.input is not None:
        inputs = {
            "dynamic": scheme.input.dynamic,
            "group_size": None,
            "num_bits": scheme.input.num_bits,
            "strategy": scheme.input.strategy,
            "symmetric": scheme.input.symmetric,
            "type": "int",
        }
    return {
        "format": format_of(scheme),
        "input_activations": inputs,
        "output_activations": None,
        "targets": targets,
        "weights": {
            "dynamic": False,
            "group_size": None if weight.group_size == -1 else weight.group_size,
            "num_bits": weight.num_bits,
            "strategy": weight.strategy,
            "symmetric": weight.symmetric,
            "type": "int",
        },
    }


def layers(names: Iterable[str]) -> list[str]:
    """See `Format.layers`."""
    found = {n.rpartition(".")[0] for n in names if n.endswith((".weight_packed", ".weight_scale"))}
    return sorted(found)


def plan(config: Mapping[str, Any], checkpoint: Checkpoint) -> LayerPlan:
    """See `Format.plan`."""
    where = str(checkpoint.path)
    _refuse_what_is_not_computed(config, checkpoint)
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ArtifactError(f"{where}: quantization_config has no config_groups; fetch its config.json again")
    schemes: dict[str, LayerScheme] = {}
    for key, group in groups.items():
        scheme = _scheme(group, f"{where}: config group {key}")
        for target in group.get("targets") or []:
            schemes[str(target)] = scheme
    ignored = [str(name) for name in config.get("ignore") or []]
    out = {}
    for layer in layers(checkpoint.tensors):
        target = _group_of(layer, schemes)
        if target is None or _group_of(layer, ignored) is not None:
            why = "no config group names it" if target is None else "`ignore` lists it"
            raise ArtifactError(
                f"{where}: {layer} is stored quantized, but {why}; its config.json does not belong to its weights"
            )
        out[layer] = schemes[target]
    kv = config.get(KV_KEY)
    return LayerPlan(out, None if kv is None else KvScheme.from_json(kv))


def _group_of(layer: str, targets: Iterable[str]) -> str | None:
    """Of the targets that name a layer, the one that decides: its exact name, then patterns in alphabetical order, then
    its class. Every quantized layer is taken for a `Linear`, the only class that is stored so."""
    names = sorted(targets)
    exact = [t for t in names if t == layer]
    patterns = [t for t in names if t.startswith("re:") and re.match(t.removeprefix("re:"), layer)]
    classes = [t for t in names if t == "Linear"]
    return next(iter([*exact, *patterns, *classes]), None)


def _refuse_what_is_not_computed(config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    where = str(checkpoint.path)
    for key, what in (
        ("kv_cache_scheme", "a calibrated KV cache"),
        ("transform_config", "rotations of weights and activations"),
        ("moe_sparsity_config", "sparse experts"),
    ):
        if config.get(key):
            raise UnsupportedError(
                f"{where}: quantization_config states {key} ({what}), which is not computed here, so its results would "
                "not be the model's; use the model that it was made from"
            )
    sparsity = config.get("sparsity_config")
    if sparsity and sparsity.get("format", "dense") != "dense":
        raise UnsupportedError(
            f"{where}: quantization_config states sparsity_config of format {sparsity.get('format')!r}, which is not "
            "read; use the model that it was made from"
        )
    status = config.get("quantization_status", "compressed")
    if status != "compressed":
        raise UnsupportedError(f"{where}: quantization_status {status!r} is not read; `compressed` folders are")
    for name in checkpoint.tensors:
        leaf = name.rpartition(".")[2]
        if leaf in _REFUSED_LEAVES:
            raise UnsupportedError(
                f"{where}: tensor {name} belongs to {_REFUSED_LEAVES[leaf]}, which is not computed here; use the model "
                "that it was made from"
            )


def _scheme(group: Any, where: str) -> LayerScheme:
    """The scheme of a config group. UnsupportedError, by name, for what is not computed."""
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise UnsupportedError(f"{where} states no scheme of its weights; only groups that spell theirs out are read")

    def refuse(what: str) -> UnsupportedError:
        return UnsupportedError(
            f"{where} states {what}, which is not computed here; integer weights of 2 to 8 bits by group or channel, "
            "with inputs in floating point or INT8 by token or tensor, are"
        )

    if group.get("format") not in (None, *_READ_FORMATS):
        raise refuse(f"format {group['format']!r}")
    if group.get("output_activations"):
        raise refuse("output_activations")
    weights, inputs = group["weights"], group.get("input_activations")
    num_bits, symmetric = _only_known(weights, "weights", refuse)
    group_size = weights.get("group_size")
    strategy = weights.get("strategy") or ("group" if group_size not in (None, -1) else "channel")
    if strategy not in ("group", "channel", "tensor") or weights.get("dynamic") or not 2 <= num_bits <= 8:
        dynamic = ", dynamic" if weights.get("dynamic") else ""
        raise refuse(f"weights of {num_bits} bits, strategy {strategy!r}{dynamic}")
    if strategy == "group" and type(group_size) is not int:
        raise refuse(f"weights of strategy 'group' with group_size {group_size!r}")
    size = group_size if strategy == "group" else -1
    weight = Scheme(num_bits=num_bits, group_size=size, symmetric=symmetric)
    if not inputs:
        return LayerScheme(weight=weight)
    num_bits, symmetric = _only_known(inputs, "input_activations", refuse)
    dynamic = inputs.get("dynamic", False)
    strategy = inputs.get("strategy") or ("token" if dynamic else "tensor")
    if num_bits != 8 or (strategy, dynamic) not in (("token", True), ("tensor", False)):
        raise refuse(f"input_activations of {num_bits} bits, strategy {strategy!r}, dynamic {dynamic!r}")
    return LayerScheme(weight=weight, input=ActivationScheme(symmetric=symmetric, dynamic=dynamic))


def _only_known(args: Any, which: str, refuse: Callable[[str], UnsupportedError]) -> tuple[int, bool]:
    """Bits, and whether symmetric, of a group's arguments; raises what `refuse` makes of anything else in them."""
    if not isinstance(args, Mapping):
        raise refuse(f"{which} {args!r}")
    if args.get("type", "int") != "int":
        raise refuse(f"{which} of type {args['type']!r}")
    if args.get("actorder") not in (None, False, "static", "weight"):
        raise refuse(f"{which} with actorder {args['actorder']!r}")
    if args.get("block_structure"):
        raise refuse(f"{which} with block_structure {args['block_structure']!r}")
    num_bits, symmetric = args.get("num_bits", 8), args.get("symmetric", True)
    if type(num_bits) is not int or type(symmetric) is not bool:
        raise refuse(f"{which} with num_bits {num_bits!r}, symmetric {symmetric!r}")
    return num_bits, symmetric


def is_symmetric(checkpoint: Checkpoint, layer: str, scheme: LayerScheme) -> bool:
    """See `Format.is_symmetric`."""
    return scheme.weight is None or scheme.weight.symmetric


def shape(checkpoint: Checkpoint, layer: str, scheme: LayerScheme) -> Shape:
    """See `Format.shape`."""
    name = f"{layer}.weight_packed" if f"{layer}.weight_packed" in checkpoint else f"{layer}.weight"
    held = checkpoint.info(name).shape
    shape = held if name.endswith(".weight") else tuple(checkpoint.tensor(f"{layer}.weight_shape").flatten().tolist())
    if len(shape) != 2 or len(held) != 2 or shape[0] != held[0] or not 0 <= shape[1] <= 32 * held[1]:
        raise ArtifactError(
            f"{checkpoint.path}: {name} {held} does not hold a weight of {shape}; its tensors do not fit each other"
        )
    return shape[0], shape[1]
