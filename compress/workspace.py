"""Which model a command means: a folder, a hub id, or, with nothing said, what the workspace holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import calibration_data
from compress.artifact import BUNDLED, MANIFEST, parent_path, read_manifest
from compress.checkpoint import INDEX, SINGLE, Checkpoint
from compress.contents import check_files
from compress.errors import ArtifactError, CompressError, ConfigError
from compress.files import file_sha256, is_file, read_json
from compress.folders import check_model_file
from compress.output import check, is_scratch

WORKSPACE = Path("artifacts")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to read. `path` is on disk; `name` is short, for file names; `said` tells the user why this one.

    is_reference: whether it is the bundled model or was made from it, so that the bundled text is its own.
    """

    path: Path
    name: str
    said: str
    is_reference: bool = False


Accept = Callable[[Path], bool]
# Formats of exports that this machine can run.
RUNNABLE = ("hf", "onnx", "onnx-trt")


def holds_weights(folder: Path) -> bool:
    """A Hugging Face folder: config.json and safetensors. Exports of that format are among them."""
    return (folder / "config.json").exists() and ((folder / SINGLE).exists() or (folder / INDEX).exists())


def is_model(folder: Path) -> bool:
    """A Hugging Face folder that no `compress export` made: what stages go on from."""
    manifest = read_manifest(folder)
    return holds_weights(folder) and (manifest is None or manifest.record["stage"] != "export")


def is_judgeable(folder: Path) -> bool:
    """What `compress evaluate` can run: a Hugging Face folder, or an export with one graph at its top."""
    return holds_weights(folder) or (folder / "model.onnx").exists() or len(list(folder.glob("*.onnx"))) == 1


def is_candidate(folder: Path) -> bool:
    """What `compress evaluate` can judge, itself or through the artifact whose codes it holds (`judged_as`)."""
    manifest = read_manifest(folder)
    return is_judgeable(folder) or (manifest is not None and manifest.record["stage"] == "export")


def judged_as(source: Source) -> Source:
    """The source itself, or, for an export that runs on its device only, the artifact that it was made from.

    The export was compared with that artifact value by value when it was written; its manifest names it. Raises
    ArtifactError when the export is not whole, or when what lies there now is not what it was made from.
    """
    manifest = None if is_judgeable(source.path) else read_manifest(source.path)
    if manifest is None or manifest.record["stage"] != "export":
        return source
    check_files(source.path)
    form = str(manifest.record.get("format"))
    if form in RUNNABLE:
        raise ArtifactError(f"{source.path}: what runs of this {form} export is gone; make the export again")
    stated = manifest.record["parent"]
    try:
        parent = parent_path(stated, source.path)
    except ArtifactError:
        raise ArtifactError(
            f"{source.path} runs on its device only, and the artifact whose weights it holds, {stated['path']}, is no "
            "longer there to be judged in its place; put it back, or make the export again"
        ) from None
    if Checkpoint.open(parent).content_sha256() != stated["sha256"]:
        raise ArtifactError(
            f"{parent} is not what {source.path} was made from any more, so it cannot be judged in its place; make the "
            "export again"
        )
    said = f"{parent}, whose weights {source.path} holds: a graph of format {form} runs on its device only"
    return replace(source, path=parent, said=said)


def resolve(
    model: str | None,
    *,
    quantizable: bool = False,
    accept: Accept = holds_weights,
    workspace: Path = WORKSPACE,
    out: Path | None = None,
    force: bool = False,
    revision: str | None = None,
) -> Source:
    """The model that the user named, or the workspace's newest artifact that `accept` takes, or the bundled model.

    With `quantizable`, artifacts that already are quantized stand for the original they came from, so that
    `compress awq --group-size 64` after `compress awq` starts from full precision again. An `out` that must not be
    written is refused here: a model of many GB is not fetched for it. revision: a branch, tag or commit of a hub model.
    """
    if out is not None:
        check(out, {}, force=force)
    if revision is not None and (model is None or Path(model).exists()):
        raise ConfigError(f"--revision {revision} is about a model of the hub; pass its id, such as org/name")
    if model is None:
        return _from_workspace(quantizable, accept, workspace)
    path = Path(model)
    if path.is_dir():
        return Source(path=path, name=_short(path.resolve().name), said=str(path), is_reference=from_reference(path))
    if path.exists():
        check_model_file(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith((".", "/")):
        found = _download(model, revision=revision)
        at = f" at {revision}" if revision else ""
        return Source(path=found, name=_short(model.split("/")[1]), said=f"{model}{at} from the hub")
    raise ConfigError(f"{model}: no such folder, and not a hub id such as org/name")


def config_only(model: str) -> Path:
    """The folder of a model whose config.json is enough: a hub model's weights are not fetched."""
    if Path(model).is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return resolve(model).path
    return _download(model, ["config.json"])


def _from_workspace(quantizable: bool, accept: Accept, workspace: Path) -> Source:
    folder, skipped = _newest(accept, workspace)
    if folder is None:
        state = "holds nothing to go on from" if any(workspace.glob(f"*/{MANIFEST}")) else "is empty"
        return _bundled(f"the bundled reference model (the workspace {state}){skipped}")
    if quantizable and "quantization_config" in read_json(folder / "config.json"):
        manifest = read_manifest(folder)
        assert manifest is not None
        if manifest.root["path"] == BUNDLED:
            return _bundled(f"the bundled reference model, from which {folder} was made{skipped}")
        path = parent_path(manifest.root, folder)
        return Source(
            path=path,
            name=_short(path.name),
            said=f"{path}, from which the newest artifact {folder} was made{skipped}",
            is_reference=from_reference(path),
        )
    said = f"{folder}, the newest artifact{skipped}"
    return Source(path=folder, name=_short(folder.name), said=said, is_reference=from_reference(folder))


def _newest(accept: Accept, workspace: Path) -> tuple[Path | None, str]:
    """The folder that was published last, of those that `accept` takes; and a note on each that cannot be told.

    Nothing in an artifact changes once it is published, so its manifest's time is that of the publishing.
    """
    manifests = [p for p in workspace.glob(f"*/{MANIFEST}") if is_file(p) and not is_scratch(p.parent)]
    skipped = ""
    for path in sorted(manifests, key=lambda p: (p.stat().st_mtime_ns, p.parent.name), reverse=True):
        try:
            if read_manifest(path.parent) is not None and accept(path.parent):
                return path.parent, skipped
        except CompressError as e:
            skipped += f"\nnote: {path.parent} was passed over: {e}"
    return None, skipped


def _bundled(said: str) -> Source:
    return Source(path=calibration_data.reference_model(), name="reference-lm", said=said, is_reference=True)


def is_reference(path: Path) -> bool:
    """Whether a folder's weights are the bundled reference model's (or quantized from them), byte for byte."""
    bundled = calibration_data.reference_model()
    if path.resolve() == bundled.resolve():
        return True
    mine, theirs = bundled / SINGLE, path / SINGLE
    if not theirs.exists() or theirs.stat().st_size != mine.stat().st_size:
        return False
    return file_sha256(mine) == file_sha256(theirs)


def from_reference(path: Path) -> bool:
    """Whether a folder is the bundled model, or an artifact whose lineage begins with it: pruned, distilled."""
    if is_reference(path):
        return True
    manifest = read_manifest(path)
    if manifest is None:
        return False
    if manifest.root["path"] == BUNDLED:
        return True
    return bool(manifest.root["sha256"] == Checkpoint.open(calibration_data.reference_model()).content_sha256())


def _short(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name) or "model"


_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")


def _download(model: str, patterns: Sequence[str] = _FILES, *, revision: str | None = None) -> Path:
    """A hub model's folder in the local cache, fetched if need be; never anything that could be a pickle."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as e:
        reason = " ".join(str(e).split())[:160]
        at = f" at revision {revision}" if revision else ""
        raise ArtifactError(f"{model}: no such folder here, and the hub did not give it{at} ({reason})") from None
