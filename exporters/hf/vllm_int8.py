"""What vLLM demands of a compressed-tensors folder of integers, checked without vLLM.

From its documentation (supported hardware: INT8 W8A8 on compute capability 7.5 to 9.0 and on CPUs) and its source:
`compressed_tensors/schemes/compressed_tensors_w8a8_int8.py` (weights symmetric, by channel or tensor; inputs static by
tensor or dynamic by token), `compressed_tensors_wNa16.py` with `utils/marlin_utils.py` (weights only: no zero points
at 8 bits, Marlin's group sizes), `compressed_tensors/utils.py` (a fused layer's parts have one scheme), and
`kernels/linear/scaled_mm` (CUTLASS and the CPU's take inputs with zero points, Triton's without only). SGLang's
`compressed_tensors_w8a8_int8.py` rounds by token without zero points, whatever the config says. Read in 2026-11, not
run.
"""

from __future__ import annotations

from collections.abc import Mapping

from compress.advice import command
from compress.errors import UnsupportedError
from compress.formats import Stored
from compress.plan import DENSE, LayerScheme, outside_blocks
from compress.quantize.head import READERS

# vLLM's models compute these as one matrix each.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
OLDEST, NEWEST = 7.5, 9.0
MARLIN_GROUP_SIZES = (-1, 32, 64, 128)


def check(folder: Stored, sm: str | None) -> list[str]:
    """Notes on what vLLM will do with the folder. sm: the target's compute capability, None for a CPU.

    UnsupportedError, with the way out, for a folder that it cannot compute there.
    """
    path = folder.checkpoint.path
    _same_in_fused(folder)
    notes = []
    head = next((name for name in folder.layers if outside_blocks(name)), None)
    if head is not None:
        needs = "; ".join(f"{reader} {version}" for reader, version in READERS.items())
        notes.append(f"{head} is in integers, which needs of a reader: {needs}; no server was run")
    for scheme, layers in folder.plan.groups().items():
        weight = scheme.weight
        if weight is None:
            continue
        if scheme.input is None:
            if weight.num_bits == 8 and not weight.symmetric:
                raise UnsupportedError(
                    f"{path}: {layers[0]} has 8-bit weights with zero points, which vLLM's kernels do not take; "
                    f"quantize the original with `{command('int8', 'MODEL', '--scheme', 'w8a16')}`"
                )
            if weight.group_size not in MARLIN_GROUP_SIZES:
                notes.append(
                    f"vLLM: group_size {weight.group_size} is not Marlin's, so {len(layers)} layers are slower"
                )
            continue
        if not weight.symmetric or weight.group_size != -1:
            raise UnsupportedError(
                f"{path}: {layers[0]} is {scheme.label()}, and vLLM multiplies integers with one symmetric scale a row "
                f"only; quantize the original with `{command('int8', 'MODEL')}`"
            )
        if sm is not None and not OLDEST <= float(sm) <= NEWEST:
            raise UnsupportedError(
                f"{path}: vLLM has INT8 W8A8 kernels for compute capability {OLDEST} to {NEWEST} and the target has "
                f"{sm}; quantize the original with `{command('int8', 'MODEL', '--scheme', 'w8a16')}`"
            )
        if not scheme.input.symmetric:
            notes.append(
                f"inputs of {len(layers)} layers have zero points: vLLM computes them on NVIDIA cards and CPUs; SGLang "
                "rounds without them, and vLLM on AMD refuses them: for these, `compress int8 --sym-activations`"
            )
    return notes


def _same_in_fused(folder: Stored) -> None:
    path, known = folder.checkpoint.path, _schemes(folder)
    for name in folder.layers:
        prefix, _, leaf = name.rpartition(".")
        group = next((g for g in FUSED if leaf in g), ())
        for other in (f"{prefix}.{part}" for part in group):
            if other in known and known[other] != known[name]:
                raise UnsupportedError(
                    f"{path}: {name} is {known[name].label()} and {other} is {known[other].label()}, but vLLM computes "
                    f"them as one matrix; quantize again with --skip for all of {', '.join(group)}, or for none"
                )


def _schemes(folder: Stored) -> Mapping[str, LayerScheme]:
    dense = {n.removesuffix(".weight"): DENSE for n in folder.checkpoint.names() if n.endswith(".weight")}
    return {**dense, **{name: folder.scheme(name) for name in folder.layers}}
