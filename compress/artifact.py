"""An artifact: a model folder with `compress.json`, the manifest that says how it was made and from what.

The manifest holds no dates, durations or host names, so that the same run gives the same bytes. It lists the hash of
every file of the artifact and ends in a hash of itself, so that whoever reads the files anyway notices what was damaged
or changed since. Once published, nothing in the folder changes: evaluations lie beside it (`evaluators.memory`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import calibration_data
from compress.errors import ArtifactError
from compress.files import IO_THREADS, file_sha256, is_file, json_bytes, read_json, write_bytes_atomically

MANIFEST = "compress.json"
SCHEMA = 1
BUNDLED = "bundled:reference_lm"

# Files of a model folder that are not weights and belong to it wherever it goes. README.md is not among them: it
# describes the original.
CARRIED = (
    "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "spiece.model", "sentencepiece*", "chat_template*", "preprocessor_config.json", "processor_config.json",
    "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `compress.json` says. `lineage[0]` is the stage that made this artifact, the last its oldest ancestor's.

    Each record holds: stage, options, parent {path, sha256}, calibration, versions, layers, groups, files.
    reports: evaluations, in artifacts of versions that kept them here.
    """

    lineage: list[dict[str, Any]]
    reports: list[dict[str, Any]]

    @property
    def record(self) -> dict[str, Any]:
        """The stage that made this artifact."""
        return self.lineage[0]

    @property
    def root(self) -> Mapping[str, Any]:
        """Path and content hash of the original model: the oldest ancestor, or what an adapter was merged to."""
        merge = next((i for i, record in enumerate(self.lineage) if record["stage"] == "merge"), len(self.lineage))
        parent: Mapping[str, Any] = self.lineage[max(0, merge - 1)]["parent"]
        return parent

    @property
    def files(self) -> Mapping[str, str] | None:
        """sha256 of each file of the artifact, by its path in the folder; None where an older version listed none."""
        return self.record.get("files")

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "lineage": self.lineage, **({"reports": self.reports} if self.reports else {})}


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, or None if no stage of ours made it.

    Raises ArtifactError when it is damaged, was edited, or is of another program or version.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return None
    value = read_json(path)
    if value.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{path}: manifest schema {_short(value.get('schema'))} is not {SCHEMA}; another version or another "
            "program wrote it"
        )
    _refuse_changed(path, value)
    lineage = value.get("lineage")
    if not isinstance(lineage, list) or not lineage:
        raise ArtifactError(f"{path}: names no stage that made the folder; another program wrote it")
    for record in lineage:
        _check_record(path, record)
    reports = value.get("reports", [])
    if not isinstance(reports, list) or not all(isinstance(r, dict) for r in reports):
        raise ArtifactError(f"{path}: its reports are not a list of objects; fetch or make the artifact again")
    return Manifest(lineage=lineage, reports=reports)


def _refuse_changed(path: Path, value: dict[str, Any]) -> None:
    """Compare a manifest with the hash of itself that it ends in. Older versions wrote none."""
    unknown = sorted(set(value) - {"schema", "lineage", "reports", "sha256"})
    stated = value.pop("sha256", None)
    if not unknown and stated is None:
        return
    try:
        written = path.read_bytes() == json_bytes({**value, "sha256": stated}) and stated == _digest(value)
    except ValueError:  # NaN
        written = False
    if unknown or not written:
        raise ArtifactError(f"{path}: is not as it was written, damaged or edited; fetch or make the artifact again")


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json_bytes(value)).hexdigest()


# What other code takes for granted of a record, in the shapes that every version wrote: name -> (type, may be absent).
_RECORD: dict[str, tuple[type, bool]] = {
    "stage": (str, False), "parent": (dict, False), "options": (dict, True), "format": (str, True),
    "calibration": (dict, True), "files": (dict, True), "versions": (dict, True), "layers": (list, True),
    "groups": (list, True),
}  # fmt: skip
_CALIBRATION: dict[str, tuple[type, bool]] = {
    "source": (str, False), "sha256": (str, False), "text_sha256": (str, True), "num_samples": (int, False),
    "seq_len": (int, False), "path": (str, True),
}  # fmt: skip


def _check_record(path: Path, record: Any) -> None:
    _check_shape(path, "a record", record, _RECORD)
    _check_shape(path, "parent", record["parent"], {"path": (str, False), "sha256": (str, False)})
    if "calibration" in record:
        _check_shape(path, "calibration", record["calibration"], _CALIBRATION)
    for name, digest in record.get("files", {}).items():
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\0" in name or not isinstance(digest, str):
            raise ArtifactError(f"{path}: lists {_short(name)}, which is no file of this folder; refused")


def _check_shape(path: Path, what: str, value: Any, shape: Mapping[str, tuple[type, bool]]) -> None:
    for name, (kind, optional) in shape.items() if isinstance(value, dict) else [("", (dict, False))]:
        found = value.get(name) if name else value
        is_absent = isinstance(value, dict) and name not in value
        if (is_absent and optional) or (isinstance(found, kind) and not isinstance(found, bool)):
            continue
        raise ArtifactError(
            f"{path}: {what}{' ' * bool(name)}{name} is {_short(found)} and not {_KINDS[kind]}; fetch or make the "
            "artifact again"
        )


_KINDS = {str: "a text", dict: "an object", list: "a list", int: "a whole number"}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write_manifest(folder: Path, manifest: Manifest, files: Mapping[str, str] | None = None) -> Manifest:
    """Write the manifest of the finished folder, with the hash of every file in it (`files`, if known); returns it."""
    known = files or {}
    names = names_in(folder)
    read = file_hashes(folder, [name for name in names if name not in known])
    hashes = {name: known.get(name) or read[name] for name in names}
    record, *before = manifest.lineage
    signed = Manifest(lineage=[{**record, "files": hashes}, *before], reports=manifest.reports)
    value = signed.to_json()
    write_bytes_atomically(folder / MANIFEST, json_bytes({**value, "sha256": _digest(value)}))
    return signed


def names_in(folder: Path) -> list[str]:
    """Every file of an artifact but its manifest: paths inside the folder, sorted."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if is_file(p) and p != folder / MANIFEST)


def file_hashes(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """sha256 of files by name. Releases the interpreter lock, so it may run in a thread."""
    with ThreadPoolExecutor(IO_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: file_sha256(folder / name), names), strict=True))


def parent_path(parent: Mapping[str, Any], folder: Path) -> Path:
    """Where a manifest's parent lies: bundled, relative to the artifact's folder, or absolute.

    Raises ArtifactError, with the way out, when it is gone.
    """
    if parent["path"] == BUNDLED:
        return calibration_data.reference_model()
    path = Path(folder, str(parent["path"])).resolve()
    if not path.is_dir():
        raise ArtifactError(
            f"{folder}: its parent {parent['path']} is no longer there; pass the original model explicitly"
        )
    return path


def path_from(out: Path, folder: Path) -> str:
    """A model as a manifest in `out` names it: bundled, or relative to the artifact so that a workspace can move."""
    path = folder.resolve()
    return BUNDLED if path == calibration_data.reference_model().resolve() else os.path.relpath(path, out.resolve())


def manifest_of(record: dict[str, Any], source: Path, out: Path) -> Manifest:
    """The manifest of what a stage made in `out` from the model in `source`: its record, and what came before."""
    earlier = read_manifest(source)
    return Manifest(lineage=[record, *(rebased(earlier.lineage, source, out) if earlier else [])], reports=[])


def rebased(lineage: Sequence[Mapping[str, Any]], old: Path, new: Path) -> list[dict[str, Any]]:
    """A lineage copied from the manifest in `old` to one in `new`: paths are relative to the manifest's own folder."""

    def moved(parent: Mapping[str, Any]) -> dict[str, Any]:
        path = str(parent["path"])
        if path == BUNDLED or Path(path).is_absolute():
            return dict(parent)
        return {**parent, "path": os.path.relpath(Path(old, path).resolve(), new.resolve())}

    return [{**record, "parent": moved(record["parent"])} for record in lineage]


def carried_files(folder: Path) -> list[Path]:
    """The files that accompany the weights, sorted by name; links that lead elsewhere are not among them."""
    return sorted({p for pattern in CARRIED for p in folder.glob(pattern) if is_file(p) and _belongs(p)})


def links_elsewhere(folder: Path) -> list[str]:
    """A note for each file that would accompany the weights but is a link out of the model: it is not followed.

    Whoever made the folder may have let LICENSE lead to a key of whoever quantizes it.
    """
    links = sorted({p for pattern in CARRIED for p in folder.glob(pattern) if not _belongs(p)})
    return [f"{p} was not taken along: it is a link to {os.readlink(p)}, outside the model" for p in links]


def _belongs(path: Path) -> bool:
    """Whether a file lies in its folder, or, in a snapshot of the hub's cache, among that very model's blobs."""
    folder = Path(os.path.realpath(path.parent))
    homes = [folder]
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        homes.append(folder.parent.parent / "blobs")
    real = Path(os.path.realpath(path))
    return any(home in real.parents for home in homes)
