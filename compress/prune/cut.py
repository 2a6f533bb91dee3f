"""What goes from a model: blocks, and in those that stay neurons, heads and hidden channels; and whether it can.

How a tensor is cut is found twice and compared. The block's own structure (`structure.py`) says which rows and columns
belong to a unit; the model that transformers builds of the new config says which shapes it wants. Where the two agree
for every tensor, and the new blocks are the old ones in everything but size, the result is an ordinary model.

Shapes: U units, H hidden channels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UnsupportedError
from compress.linear import is_conv1d
from compress.model import StreamedModel
from compress.prune.shape import Counter, Shape, config_of, shape_of, skeleton
from compress.prune.structure import Section, Structure

# Attributes that follow from a block's place, not from what it computes.
_PLACES = ("layer_idx", "layer_id", "layer_number")
_SCALARS = (bool, int, float, str, type(None))


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A model's new shape and what each block needs to get there.

    kept: blocks that stay, ascending. structure: of every block; None when only blocks go. channels: hidden channels
    that stay (int64, ascending), or None for all. hidden_axes: which axes of a tensor are the hidden state's, by the
    model's name for tensors outside the blocks and by the block's own inside. attributes: see `blocks.Reshaping`.
    final_scale: what the norm behind the last block is multiplied by, see `channels.py`.
    """

    old: Shape
    shape: Shape
    kept: tuple[int, ...]
    structure: Structure | None = None
    channels: Tensor | None = None
    hidden_axes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    final_scale: float = 1.0

    @property
    def heads(self) -> Section | None:
        """The heads, if some of them go."""
        fewer = self.structure is not None and self.shape.heads < self.old.heads
        return self.structure.heads if fewer and self.structure else None

    @property
    def neurons(self) -> Section | None:
        """The MLP's neurons, if some of them go."""
        fewer = self.structure is not None and self.shape.intermediate < self.old.intermediate
        return self.structure.neurons if fewer and self.structure else None


def plan_cut(
    model: StreamedModel,
    shape: Shape,
    kept: Sequence[int],
    structure: Structure | None = None,
    channels: Tensor | None = None,
) -> Cut:
    """How to get from the model to `shape`. UnsupportedError, in one sentence, when its parts cannot be told."""
    old = shape_of(model)
    made = skeleton(model, config_of(model, shape, kept))
    cut = Cut(
        old=old,
        shape=shape,
        kept=tuple(kept),
        structure=structure,
        channels=channels,
        hidden_axes=_hidden_axes(model, shape, kept),
    )
    new_blocks = _blocks(made, model)
    cut = replace(cut, attributes=_changed_attributes(model, new_blocks, kept, shape))
    _check_outside(model, made, cut)
    for position, index in enumerate(kept):
        _check_shapes(model, index, new_blocks[position], cut)
    return cut


def cut_axis(value: Tensor, axis: int, kept: Tensor) -> Tensor:
    """A tensor with only the indices `kept` of an axis."""
    return value.index_select(axis, kept.to(value.device))


def row_axis(module: nn.Module) -> int:
    """The axis of a linear's stored weight that its outputs lie along."""
    return 1 if is_conv1d(module) else 0


def _blocks(made: nn.Module, model: StreamedModel) -> list[nn.Module]:
    found = made.get_submodule(model.blocks_name)
    return list(found.children())


def _family(model: StreamedModel) -> str:
    return f"{model.checkpoint.path} (type {model.checkpoint.config.get('model_type')!r})"


def _hidden_axes(model: StreamedModel, shape: Shape, kept: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Axes that change when only the hidden size does: found by building the model so, with its heads or the new ones.

    A hidden size that the model's heads do not divide is built with those that stay; some configs insist on that.
    """
    old = shape_of(model)
    if shape.hidden == old.hidden:
        return {}
    counter = Counter(model)
    heads = [replace(old, blocks=1), replace(old, blocks=1, heads=shape.heads, kv_heads=shape.kv_heads)]
    pairs = [(wide, replace(wide, hidden=shape.hidden)) for wide in heads]
    built = next((pair for pair in pairs if all(counter.builds(one) for one in pair)), pairs[0])
    counter.check(built[1])
    wide, narrow = (skeleton(model, config_of(model, one, kept[:1])) for one in built)
    inside = f"{model.blocks_name}."
    blocks = [dict(_blocks(made, model)[0].named_parameters()) for made in (wide, narrow)]
    outside = [{n: v for n, v in made.named_parameters() if not n.startswith(inside)} for made in (wide, narrow)]
    out = {n: _differing(v, before[n]) for before, after in (blocks, outside) for n, v in after.items()}
    return {name: axes for name, axes in out.items() if axes}


def _differing(one: Tensor, other: Tensor) -> tuple[int, ...]:
    return tuple(axis for axis, (a, b) in enumerate(zip(one.shape, other.shape, strict=True)) if a != b)


# ---- refusals ------------------------------------------------------------------------------------------


def _scalars(module: nn.Module) -> dict[str, Any]:
    """What a module notes beside its weights, its place left out."""
    own = {key: value for key, value in vars(module).items() if not key.startswith("_") and key not in _PLACES}
    return {key: value for key, value in own.items() if isinstance(value, _SCALARS)}


def _changed_attributes(
    model: StreamedModel, new_blocks: Sequence[nn.Module], kept: Sequence[int], shape: Shape
) -> dict[str, dict[str, Any]]:
    """Sizes that modules of a block note beside their weights and that change; the same for every block.

    Refuses a model whose blocks become others by their new place (attention types that a config counts out by itself).
    """
    changed: dict[str, dict[str, Any]] | None = None
    same_widths = replace(shape, blocks=0) == replace(shape_of(model), blocks=0)
    for position, index in enumerate(kept):
        old_modules = dict(model.blocks[index].named_modules())
        found: dict[str, dict[str, Any]] = {}
        for name, module in new_blocks[position].named_modules():
            before, after = _scalars(old_modules[name]), _scalars(module)
            differing = {key: value for key, value in after.items() if before.get(key) != value}
            wrong = next((k for k, v in differing.items() if same_widths or type(v) is not int), None)
            if wrong is not None and not same_widths:
                raise UnsupportedError(
                    f"{_family(model)}: that width cannot be cut, {name}.{wrong} follows from it "
                    f"({before.get(wrong)!r} would be {after[wrong]!r}); use --depth"
                )
            if wrong is not None or before.keys() != after.keys():
                what = wrong or "another module"
                raise UnsupportedError(
                    f"{_family(model)}: block {index} would become another one at place {position}: its {name} has "
                    f"{what} = {before.get(what)!r} here and {after.get(what)!r} there; such a model cannot be pruned"
                )
            if differing:
                found[name] = differing
        if changed is not None and found != changed:
            raise UnsupportedError(
                f"{_family(model)}: its blocks do not change alike when they become smaller; use --depth"
            )
        changed = found
    return changed or {}


def _check_outside(model: StreamedModel, made: nn.Module, cut: Cut) -> None:
    """What lies around the blocks must stay the same but for the hidden size."""
    inside = f"{model.blocks_name}."
    before = {n: p for n, p in model.model.named_parameters() if not n.startswith(inside)}
    for name, value in made.named_parameters():
        if name.startswith(inside):
            continue
        wanted = list(before[name].shape)
        for axis in cut.hidden_axes.get(name, ()):
            wanted[axis] = cut.shape.hidden
        if tuple(value.shape) != tuple(wanted):
            raise UnsupportedError(_not_found(model, name, tuple(wanted), tuple(value.shape)))
    old_modules = dict(model.model.named_modules())
    for name, module in made.named_modules():
        if name.startswith(inside) or name + "." == inside:
            continue
        old = old_modules[name]
        scale = next((k for k, v in vars(module).items() if isinstance(v, float) and vars(old).get(k) != v), None)
        tables = dict(old._buffers)
        for key, buffer in module._buffers.items():
            there = tables.get(key)  # of the model, which may lie on a GPU
            if buffer is not None and there is not None and not torch.equal(buffer, there.to(buffer.device)):
                scale = key
        if scale is not None:
            raise UnsupportedError(
                f"{_family(model)}: {name}.{scale} follows from the hidden size, so channels cannot go one by one; "
                "use --depth, --intermediate or --heads"
            )


def _check_shapes(model: StreamedModel, index: int, made: nn.Module, cut: Cut) -> None:
    """Every tensor of a block, cut as its structure says, must have the shape that transformers wants."""
    found = cut_shapes(model.blocks[index], cut)
    for name, value in made.named_parameters():
        if found[name] != tuple(value.shape):
            raise UnsupportedError(_not_found(model, name, found[name], tuple(value.shape)))


def _not_found(model: StreamedModel, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    return (
        f"{_family(model)}: {name} would be cut to {list(found)}, but a model of that config has {list(wanted)} there; "
        "this family's widths are not found, use --depth"
    )


def cut_shapes(block: nn.Module, cut: Cut) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a block once it is cut."""
    shapes = {name: list(p.shape) for name, p in block.named_parameters()}
    for section, size in ((cut.heads, cut.shape.heads), (cut.neurons, cut.shape.intermediate)):
        if section is None:
            continue
        units = some_units(section, size, cut)
        consumer = block.get_submodule(section.consumer)
        shapes[f"{section.consumer}.weight"][1 - row_axis(consumer)] = size * section.unit_size
        for name, rows in section.kept_rows(units).items():
            shapes[f"{name}.weight"][row_axis(block.get_submodule(name))] = len(rows)
            if f"{name}.bias" in shapes:
                shapes[f"{name}.bias"][0] = len(rows)
    for name, axes in cut.hidden_axes.items():
        for axis in axes if name in shapes else ():
            shapes[name][axis] = cut.shape.hidden
    return {name: tuple(shape) for name, shape in shapes.items()}


def some_units(section: Section, keep: int, cut: Cut) -> Tensor:
    """Any `keep` units that may stay: evenly from the groups, or whole groups where groups go."""
    if section.unit_size == 1:
        return torch.arange(keep)
    group_U = section.group_U
    groups = cut.shape.kv_heads if cut.shape.kv_heads < cut.old.kv_heads else section.num_groups
    return torch.cat([(group_U == g).nonzero().flatten()[: keep // groups] for g in range(groups)]).sort().values


def needs_structure(old: Shape, shape: Shape) -> bool:
    """Whether units go, and not blocks or hidden channels alone."""
    return shape.heads < old.heads or shape.intermediate < old.intermediate
