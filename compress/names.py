"""What a checkpoint calls each of a model's parameters, and what of it no parameter takes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError, UnsupportedError
from compress.formats import FORMATS, Stored
from compress.weights import same_tensor

# Tensors that old versions of transformers stored and that every version since computes.
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|\.(masked_bias|position_ids)|\.(attn|attention|self_attn)\.bias)$")
_CODES = tuple(leaf for format in FORMATS.values() for leaf in format.CODES)
_SCALE = re.compile(r"scale|absmax|quant_|qzeros|zero_point|g_idx|SCB$")


def source_names(folder: Stored, model: nn.Module) -> dict[str, str]:
    """For each of the model's state names, the checkpoint's name for it (`.weight` for a quantized layer).

    Folders differ in whether they carry the base model's prefix (GPT-2's often do not), keep names that transformers
    has changed since (GPT-NeoX's `embed_out`), and leave out one of two tied tensors, either. ArtifactError for a
    parameter that is not stored, and for one that is stored twice with different values.
    """
    stored = _by_state_name(folder, model)
    tied = _tied(model)
    out: dict[str, str] = {}
    for name in model.state_dict(keep_vars=True):
        found = stored.get(name) or next((stored[other] for other in tied.get(name, ()) if other in stored), None)
        if found is None:
            raise _missing(folder.checkpoint, model, name)
        out[name] = found
    return out


def check_all_read(folder: Stored, model: nn.Module, source: Mapping[str, str], blocks: str, count: int) -> None:
    """Raise ArtifactError for a stored tensor that belongs to a block or a layer of the model and that nothing reads.

    transformers ignores it with a warning, and computes another model than the one that was trained: biases that
    config.json denies, blocks beyond its count, scales that it does not mention. blocks: the name of the list of
    `count` blocks. Whole parts that the language model does not run (a vision tower) are not meant.
    """
    taken, checkpoint = set(source.values()), folder.checkpoint
    prefix = str(model.base_model_prefix)
    block = re.compile(rf"(?:{re.escape(prefix)}\.)?{re.escape(_bare(blocks, model))}\.(\d+)\.")
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    leaves = {n for n, m in model.named_modules() if m._parameters and not m._modules}
    for today, name in _today(folder, model):
        if name in taken or _COMPUTED.search(name) or any(p.search(name) or p.search(today) for p in ignored):
            continue
        place = block.match(today)
        if place and int(place[1]) >= count:
            raise ArtifactError(
                f"{checkpoint.path}: holds {name}, but config.json describes {count} blocks; restore the config.json "
                "that belongs to these weights"
            )
        parent = today.rpartition(".")[0]
        if place or {parent, _bare(parent, model), f"{prefix}.{parent}"} & leaves:
            raise _unread(checkpoint, name)


def _unread(checkpoint: Checkpoint, name: str) -> ArtifactError:
    layer, _, leaf = name.rpartition(".")
    options = (re.sub(r"_scale(_inv|_2)?$", "", name), *(f"{layer}.{s}" for s in ("weight", *_CODES)))
    weight = next((n for n in options if n != name and n in checkpoint), None)
    if weight is not None and _SCALE.search(leaf):
        return _unstated(checkpoint, weight, f"scaled by {name}")
    return ArtifactError(
        f"{checkpoint.path}: tensor {name} {list(checkpoint.info(name).shape)} has no place in the model of type "
        f"{checkpoint.config.get('model_type')!r} that config.json describes; restore the config.json of these weights"
    )


def _unstated(checkpoint: Checkpoint, name: str, how: str) -> ArtifactError:
    return ArtifactError(
        f"{checkpoint.path}: {name} is stored as {checkpoint.info(name).dtype} and {how}, but config.json has no "
        "quantization_config that says so; restore it, or pass the full-precision model"
    )


def _missing(checkpoint: Checkpoint, model: nn.Module, name: str) -> Exception:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    for converter in get_model_conversion_mapping(model):
        if isinstance(converter, WeightConverter):
            old = next((n for n in checkpoint.names() if converter.rename_source_key(n)[1] is not None), None)
            if old is not None:
                return UnsupportedError(
                    f"{checkpoint.path}: it stores {old}, of which transformers makes {name} while it loads, and that "
                    "is not done here; pass a folder that stores the model's own tensors"
                )
    named = (checkpoint.config.get("architectures") or [type(model).__name__])[0]
    if named != type(model).__name__ and not named.endswith(("ForCausalLM", "LMHeadModel")):
        return UnsupportedError(
            f"{checkpoint.path}: holds a {named}, which lacks {name} of a causal language model; pass the folder of a "
            f"{type(model).__name__}"
        )
    tied = " and config.json does not tie it" if _is_output(model, name) else ""
    return ArtifactError(
        f"{checkpoint.path}: tensor {name} is missing{tied}; the download may be incomplete, fetch the model again"
    )


def _is_output(model: nn.Module, name: str) -> bool:
    output = model.get_output_embeddings()  # type: ignore[operator]
    return output is not None and any(m is output and name == f"{n}.weight" for n, m in model.named_modules())


def _bare(name: str, model: nn.Module) -> str:
    return name.removeprefix(f"{model.base_model_prefix}.")


def _by_state_name(folder: Stored, model: nn.Module) -> dict[str, str]:
    """The model's state name -> the folder's name of what belongs there."""
    checkpoint = folder.checkpoint
    state = model.state_dict(keep_vars=True)
    prefix = f"{model.base_model_prefix}."
    out: dict[str, str] = {}
    for today, name in _today(folder, model):
        options = (today, name, today.removeprefix(prefix), prefix + today)
        place = next((o for o in options if o in state), None)
        if place is None:
            continue
        other = out.setdefault(place, name)
        if other != name and not _same(checkpoint, other, name):
            raise ArtifactError(
                f"{checkpoint.path}: {other} and {name} both are {place}, and they differ; fetch the model again into "
                "an empty folder"
            )
    return out


def _same(checkpoint: Checkpoint, a: str, b: str) -> bool:
    both = a in checkpoint and b in checkpoint
    return both and same_tensor(checkpoint.path, checkpoint.info(a), checkpoint.info(b))


def _today(folder: Stored, model: nn.Module) -> list[tuple[str, str]]:
    """Today's name of every tensor that the folder can give, and its name there; `.weight` for a quantized layer's."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    _check_stated(folder)
    renamings = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    out: list[tuple[str, str]] = []
    for dense in folder.dense_names():
        today = dense
        for renaming in renamings:
            today = renaming.rename_source_key(today)[0]
        out.append((today, dense))
    return out


def _check_stated(folder: Stored) -> None:
    """Raise ArtifactError for codes that no quantization_config speaks of, and for a layer stored with and without."""
    checkpoint, taken = folder.checkpoint, folder.taken()
    for name in checkpoint.names():
        layer, _, leaf = name.rpartition(".")
        if leaf in _CODES and name not in taken:
            raise _unstated(checkpoint, name, "quantized")
        if leaf == "weight" and layer in folder and name not in taken:
            raise ArtifactError(
                f"{checkpoint.path}: holds the layer {layer} quantized and not quantized; fetch the model again into "
                "an empty folder"
            )


def _tied(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each tied parameter, the names of those it is tied with."""
    pairs: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    if not pairs and getattr(model.config, "tie_word_embeddings", False):
        names = {id(m): n for n, m in model.named_modules()}
        output, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
        if output is not None:
            pairs = {f"{names[id(output)]}.weight": f"{names[id(embedding)]}.weight"}
    groups: dict[str, list[str]] = {}
    for target, origin in pairs.items():
        groups.setdefault(origin, [origin]).append(target)
    return {name: tuple(n for n in members if n != name) for members in groups.values() for name in members}
