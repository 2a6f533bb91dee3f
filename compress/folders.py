"""What a folder is that is not a model: each kind named, with what to do about it."""

from __future__ import annotations

import shlex
from contextlib import suppress
from pathlib import Path

from compress.errors import ArtifactError, CompressError, UnsupportedError, reason
from compress.files import check_file, is_file, read_json
from compress.weights import holds_safetensors

ADAPTER = "adapter_config.json"
_HUGGING_FACE = "pass the Hugging Face folder it was made from (config.json and safetensors)"


def check_folder(folder: Path) -> None:
    """Raise the error that says what `folder` is, when it is not a Hugging Face model folder."""
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder; pass a Hugging Face model folder with config.json")
    check_members(folder)
    if is_file(folder / ADAPTER):
        raise _adapter(folder)
    if is_file(folder / "model_index.json"):
        raise UnsupportedError(
            f"{folder} is a diffusers pipeline, several models that make images or sound; pass the folder of a causal "
            "language model"
        )
    if (folder / "config.json").exists() or (folder / "config.json").is_symlink():
        if not holds_safetensors(folder) and (other := _other_format(folder)):
            raise other
        return
    raise _other_format(folder) or ArtifactError(
        f"{folder / 'config.json'}: no such file; {folder} is not a complete model folder"
    )


def check_members(folder: Path) -> None:
    """Raise ArtifactError for a pipe, a socket or a device in the folder: whoever opens it may wait for ever."""
    try:
        members = sorted(folder.iterdir())
    except OSError as e:
        raise ArtifactError(f"{folder}: cannot be read ({reason(e)}); make the folder readable") from None
    for path in members:
        with suppress(OSError):
            if not (path.is_dir() or path.is_file()) and path.exists():
                check_file(path)


def check_model_file(path: Path) -> None:
    """Raise the error for a file that was passed as a model."""
    if path.suffix == ".gguf":
        raise UnsupportedError(f"{path} is a GGUF file, llama.cpp's own format, which is not read; {_HUGGING_FACE}")
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise UnsupportedError(f"{path} is a pickle that could run code, which is not opened; {_HUGGING_FACE}")
    beside = path.parent if is_file(path.parent / "config.json") else None
    raise ArtifactError(f"{path} is a file; pass the model's folder{f', {beside}' if beside else ''}")


def _adapter(folder: Path) -> CompressError:
    base = read_json(folder / ADAPTER).get("base_model_name_or_path") or "its base model"
    option = f"--adapter {shlex.quote(str(folder))}"
    merge = f"pass {base} with {option}, or merge it (peft: merge_and_unload) and pass the merged folder"
    if holds_safetensors(folder):
        return ArtifactError(
            f"{folder} holds a model and beside it a LoRA adapter ({ADAPTER}), which some readers would add to it; "
            f"move the adapter elsewhere, or {merge}"
        )
    return UnsupportedError(f"{folder} is a LoRA adapter, not a model; {merge}")


def _other_format(folder: Path) -> CompressError | None:
    """For a folder without config.json or without safetensors: the format it is in, if that is known."""
    try:
        names = sorted(p.name for p in folder.iterdir())
    except OSError:
        return None
    gguf = [n for n in names if n.endswith(".gguf")]
    if gguf:
        return UnsupportedError(f"{folder} holds {gguf[0]}, llama.cpp's own format, which is not read; {_HUGGING_FACE}")
    if "snapshots" in names and "refs" in names:
        return ArtifactError(f"{folder} is a folder of the hub's cache; pass one below {folder / 'snapshots'}")
    if "params.json" in names and any(n.startswith("consolidated") for n in names):
        return UnsupportedError(
            f"{folder} holds weights in the publisher's own layout (params.json, consolidated.*), which is not read; "
            "pass the Hugging Face folder of the same model"
        )
    graphs = [n for n in names if n.endswith((".onnx", ".engine", ".plan"))]
    if graphs:
        return UnsupportedError(
            f"{folder} holds {graphs[0]}, a graph for a device and not weights; pass the folder it was exported from"
            f"{_exported_from(folder)}"
        )
    return None


def _exported_from(folder: Path) -> str:
    """`, PATH` of the artifact that a graph was made of, where a manifest lies beside it and the artifact is there."""
    try:
        path = Path(folder, read_json(folder / "compress.json")["lineage"][0]["parent"]["path"]).resolve()
    except (CompressError, KeyError, IndexError, TypeError, ValueError, OSError):
        return ""
    return f", {path}" if path.is_dir() else ""
