"""Which group sizes a model's layers have, and which is taken when none is asked for. Headers and config.json only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from compress import stage
from compress.errors import UnsupportedError
from compress.model import StreamedModel
from compress.plan import LayerPlan, LayerScheme
from compress.scheme import GROUP_SIZES, Scheme, dividing


def asked_scheme(
    folder: Path,
    num_bits: int,
    group_size: int | None,
    symmetric: bool,
    skip: Sequence[str] = (),
    *,
    trust_remote_code: bool = False,
) -> tuple[Scheme, str]:
    """The scheme that was asked for, with a group size chosen for the model in `folder` where none was (None).

    And one line that says why that one, or nothing.
    """
    why = ""
    if group_size is None:
        outline = StreamedModel.outline(folder, trust_remote_code=trust_remote_code)
        stage.refuse_quantized(outline)
        group_size, why = chosen_group_size(outline, skip)
    return Scheme(num_bits=num_bits, group_size=group_size, symmetric=symmetric), why


def chosen_group_size(model: StreamedModel, skip: Sequence[str] = ()) -> tuple[int, str]:
    """The largest of `GROUP_SIZES` that divides the inputs of every layer not skipped; and one line that says why.

    The line is empty for the first of them, the field's default. Raises UnsupportedError when none does.
    """
    shapes = shapes_quantized(model, skip)
    sizes = dividing(shape[1] for shape in shapes.values())
    if sizes:
        usual = GROUP_SIZES[0]
        other = next((name for name, shape in shapes.items() if shape[1] % usual), None)
        if other is None:
            return sizes[0], ""
        return sizes[0], (
            f"group size: {sizes[0]}, the largest of {_listed(GROUP_SIZES)} that divides every layer's inputs "
            f"({usual} does not divide the {shapes[other][1]} of {other})"
        )
    smallest = GROUP_SIZES[-1]
    name = next(name for name, shape in shapes.items() if shape[1] % smallest)
    raise UnsupportedError(
        f"{name} has {shapes[name][1]} inputs, which none of the group sizes {_listed(GROUP_SIZES)} divides; leave it "
        f"in float16 with --skip {name}, or choose a --group-size that divides {shapes[name][1]}"
    )


def shapes_quantized(model: StreamedModel, skip: Sequence[str] = ()) -> Mapping[str, tuple[int, int]]:
    """`(out_features, in_features)` of the blocks' linears that are not skipped, by the checkpoint's names."""
    _, inside = stage.names_of(model)
    return stage.shapes_of(model, LayerPlan.uniform(inside, LayerScheme(weight=Scheme()), skip=skip))


def _listed(sizes: Sequence[int]) -> str:
    return f"{', '.join(str(n) for n in sizes[:-1])} and {sizes[-1]}"
