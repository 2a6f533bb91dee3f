"""Any artifact as a transformers model, whatever transformers itself can load: `load_model`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from compress.api.calls import PathLike

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(
    model: PathLike | None = None, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The transformers model of a folder, with the weights that its integers stand for, in `dtype`; for eval.

    model: a plain model or an artifact, AutoAWQ's or compressed-tensors', mixed ones with zero points included (which
    transformers 5.23 does not load itself), or None for what the workspace holds. Inputs that the folder says are
    quantized are, as in every judgement here; a KV cache is not, since transformers holds it. The whole model is in
    memory: 2 or 4 bytes a parameter, whatever the folder takes. Raises CompressError subclasses.
    """
    from transformers import GenerationConfig

    from compress.devices import pick_device, pick_dtype
    from compress.model import StreamedModel
    from compress.skeleton import GENERATION
    from compress.stage import DTYPES
    from compress.workspace import holds_weights, resolve

    device = pick_device(device)
    folder = resolve(None if model is None else os.fspath(model), accept=holds_weights).path
    streamed = StreamedModel.open(
        folder, dtype=DTYPES[pick_dtype(dtype, device)], device=device, trust_remote_code=trust_remote_code
    )
    streamed.load_whole()
    loaded: Any = streamed.model
    if (folder / GENERATION).is_file():
        loaded.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    whole: PreTrainedModel = loaded.eval()
    return whole
