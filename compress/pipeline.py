"""What recipes have made in a workspace, by what decided it, so that a step with the same inputs is not run again.

A file beside the artifacts, `runs.json`, holds an entry for each finished step: its key, the folder, the hash of that
folder's manifest (which lists the hash of every file). The key is a hash of the stage, its options, the content of all
that it reads, the kind of device and the versions: two recipes that share a step share its artifact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.artifact import MANIFEST, read_manifest
from compress.checkpoint import Checkpoint
from compress.contents import check_files
from compress.devices import pick_device
from compress.errors import CompressError
from compress.files import file_sha256, is_file, json_bytes, read_json, write_bytes_atomically
from compress.lock import locked
from compress.stage import versions
from compress.weights import holds_safetensors

RUNS = "runs.json"
KIND = "runs of recipes"
REPORT = "report.json"
ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Made:
    """A finished step. out: the folder's name in the workspace. made: hash of its manifest, or of its report.

    seconds: how long it took. exit_code, said: of a gate.
    """

    recipe: str
    step: str
    stage: str
    out: str
    made: str
    seconds: float
    exit_code: int = 0
    said: str = ""


class Runs:
    """The workspace's `runs.json`. A file that is none of ours is an error, and never written over."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace
        self.path = workspace / RUNS

    def entries(self) -> dict[str, Made]:
        """Every finished step by its key, those first that were finished first."""
        return {key: Made(**value) for key, value in self._read()["made"].items()}

    def find(self, key: str) -> Made | None:
        """The step of that key, if what it made is still there as it was; every byte is compared."""
        entry = self.entries().get(key)
        return entry if entry is not None and self._is_whole(entry) else None

    def seconds(self, recipe: str, step: str) -> float | None:
        """How long this step took last."""
        took = [e.seconds for e in self.entries().values() if (e.recipe, e.step) == (recipe, step)]
        return took[-1] if took else None

    def is_ours(self, out: Path, stage: str) -> bool:
        """Whether a step made the folder, or was killed while it did: it may be replaced."""
        found = hash_of(out)
        if any(e.out == out.name and e.made == found for e in self.entries().values()):
            return True
        if out.name not in self._read()["begun"]:
            return False
        manifest = read_manifest(out)
        return manifest is not None and manifest.record["stage"] == stage

    def begin(self, out: Path, key: str) -> None:
        """A step starts to make `out`."""
        self._change(lambda value: value["begun"].update({out.name: key}))

    def finish(self, key: str, entry: Made) -> None:
        """It is made."""

        def change(value: dict[str, Any]) -> None:
            value["begun"].pop(entry.out, None)
            gone = [k for k, e in value["made"].items() if e["out"] == entry.out]
            for k in gone:
                del value["made"][k]
            value["made"][key] = asdict(entry)

        self._change(change)

    def _is_whole(self, entry: Made) -> bool:
        folder = self.workspace / entry.out
        if hash_of(folder) != entry.made:
            return False
        try:
            if entry.stage != "evaluate":
                check_files(folder)
        except CompressError:
            return False
        return True

    def _read(self) -> dict[str, Any]:
        if not is_file(self.path):
            return {"kind": KIND, "made": {}, "begun": {}}
        value = read_json(self.path)
        if value.get("kind") != KIND:
            raise CompressError(f"{self.path} is in the way and holds no {KIND}; move it elsewhere")
        return value

    def _change(self, change: Callable[[dict[str, Any]], None]) -> None:
        self.workspace.mkdir(parents=True, exist_ok=True)
        with locked(self.workspace / f".{RUNS}.compress-lock", str(self.path), wait=lambda who: None):
            value = self._read()
            change(value)
            write_bytes_atomically(self.path, json_bytes(value))


def hash_of(folder: Path) -> str | None:
    """Of the manifest of what a step made, or of its report; None where there is neither."""
    path = next((folder / name for name in (MANIFEST, REPORT) if is_file(folder / name)), None)
    return None if path is None else file_sha256(path)


def key_of(stage: str, params: Mapping[str, Any], takes: Path) -> str:
    """What decides the bytes that a step makes. takes: the model that it starts from."""
    decided = {name: _content(value) for name, value in sorted(params.items()) if value != takes}
    if "device" in params:
        decided["device"] = pick_device(params["device"]).split(":")[0]
    value = {"stage": stage, "options": decided, "takes": content(takes), "versions": versions()}
    return hashlib.sha256(json_bytes(value)).hexdigest()


def _content(value: Any) -> Any:
    """A parameter as JSON; the content of what it names on disk stands for its name."""
    if isinstance(value, tuple | list):
        return [_content(v) for v in value]
    if isinstance(value, str | Path):
        found = content(Path(value)) if len(str(value)) < 4096 else None
        return found or str(value)
    return value


def content(path: Path) -> str | None:
    """Hash of what lies at a path: an artifact's manifest, a model's content, a file's bytes; None for nothing such."""
    try:
        if is_file(path):
            return file_sha256(path)
        if is_file(path / MANIFEST):
            return file_sha256(path / MANIFEST)
        if is_file(path / ADAPTER):
            return file_sha256(path / ADAPTER)
        is_model = is_file(path / "config.json") and holds_safetensors(path)  # a plan may be of a config alone
        return Checkpoint.open(path).content_sha256() if is_model else None
    except (OSError, ValueError):
        return None
