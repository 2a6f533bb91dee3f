"""What a checkpoint calls each of a model's parameters."""

from __future__ import annotations

from torch import nn

from compress.errors import ArtifactError
from compress.formats import Stored


def source_names(folder: Stored, model: nn.Module) -> dict[str, str]:
    """For each of the model's state names, the checkpoint's name for it.

    Folders differ in whether they carry the base model's prefix (GPT-2's often do not), keep names that transformers
    has changed since (GPT-NeoX's `embed_out`), and leave out tied tensors.
    """
    prefix = f"{model.base_model_prefix}."
    stored = _stored_names(folder, model)
    tied = _tied(model)
    out: dict[str, str] = {}
    for name in model.state_dict(keep_vars=True):
        for candidate in (name, tied.get(name, name)):
            options = (candidate, candidate.removeprefix(prefix), prefix + candidate)
            found = next((o for o in options if o in stored), None)
            if found is not None:
                out[name] = stored[found]
                break
        else:
            raise ArtifactError(
                f"{folder.checkpoint.path}: tensor {name} is missing; the download may be incomplete, fetch the model "
                "again"
            )
    return out


def _stored_names(folder: Stored, model: nn.Module) -> dict[str, str]:
    """Today's name of every dense tensor the folder can give -> its name there (`.weight` for a quantized one)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    out: dict[str, str] = {}
    for dense in folder.dense_names():
        today = dense
        for renaming in renamings:
            today = renaming.rename_source_key(today)[0]
        out[today] = dense
        out.setdefault(dense, dense)
    return out


def _tied(model: nn.Module) -> dict[str, str]:
    """Output matrix name -> input embedding name, when the config ties them."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return {}
    names = {id(m): n for n, m in model.named_modules()}
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if output is None:
        return {}
    return {f"{names[id(output)]}.weight": f"{names[id(embedding)]}.weight"}
