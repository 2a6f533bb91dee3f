"""A folder of mixed schemes as its readers take it: which config group names which linear, checked on the written file.

compressed-tensors sorts targets (exact names, then patterns by their text, then classes), and of two groups that name a
layer the loser vanishes without a word; vLLM refuses fused linears of several schemes. So exact names, each once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError
from compress.formats import stored
from compress.plan import DENSE, LayerPlan, LayerScheme, outside_blocks
from compress.quantize.menu import label


def lint(checkpoint: Checkpoint, plan: LayerPlan, fused: Sequence[Sequence[str]]) -> None:
    """Every target of a folder's config groups expanded over its linears: each quantized one is named by exactly one
    group, by its exact name where there are several, none by `ignore`; what is fused has one scheme; and the folder is
    read as planned.

    Raises ArtifactError. fused: sets of linears that an engine computes as one matrix.
    """
    where = checkpoint.path
    read = stored(checkpoint).plan
    meant = {name: plan[name] for name in plan.quantized}
    if dict(read) != {name: meant[name] for name in sorted(meant)} and not _same_but_for_symmetry(read, meant):
        wrong = next(n for n in sorted({*read, *meant}) if read.get(n) != meant.get(n))
        raise ArtifactError(f"{where}: {wrong} is read as {_said(read.get(wrong))} and was planned as "
                            f"{_said(meant.get(wrong))}; this is a fault of compress, please report it")  # fmt: skip
    for names in fused:
        if len({plan.get(name, DENSE) for name in names}) > 1:
            raise ArtifactError(f"{where}: {', '.join(names)} are one matrix in engines and have several schemes")
    groups = checkpoint.config["quantization_config"].get("config_groups")
    if groups is None:
        return
    ignored = set(checkpoint.config["quantization_config"]["ignore"])
    targets = [target for group in groups.values() for target in group["targets"]]
    unnamed = [name for name in meant if outside_blocks(name) and name not in targets]
    if unnamed:
        raise ArtifactError(f"{where}: no config group names {unnamed[0]}, which readers do not take for a Linear")
    if len(groups) > 1 and (len(set(targets)) < len(targets) or set(targets) != set(meant) or ignored & set(meant)):
        raise ArtifactError(f"{where}: its config groups do not name every quantized linear exactly once")


def _same_but_for_symmetry(read: LayerPlan, meant: Mapping[str, LayerScheme]) -> bool:
    """AutoAWQ's config does not say whether codes are symmetric."""

    def key(scheme: LayerScheme) -> tuple[int, int] | None:
        return None if scheme.weight is None else (scheme.weight.num_bits, scheme.weight.group_size)

    return {n: key(s) for n, s in read.items()} == {n: key(s) for n, s in meant.items()}


def _said(scheme: LayerScheme | None) -> str:
    return "float16" if scheme is None else label(scheme)
