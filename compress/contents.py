"""Whether the files of a model folder are those that were published: read once, hashed, compared with the manifest.

Whoever reads every byte anyway (the content hash of a parent, an export's copy) gets the comparison with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from compress.artifact import CARRIED, MANIFEST, file_hashes, names_in, read_manifest
from compress.checkpoint import Checkpoint, content_of
from compress.errors import ArtifactError
from compress.files import is_file
from compress.weights import holds_safetensors

# Names of files that change what the model computes or reads, if they are added to a folder.
_TELLING = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "*.onnx", "*.onnx.data", "*.onnx_data",
    "genai_config.json", "adapter_config.json", "hf_quant_config.json",
)  # fmt: skip
_LEGAL = ("LICENSE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What a folder holds against what its manifest lists. hashes: of every file that was read, by name.

    gone, changed, added: names; added ones are files that the manifest does not list. listed: whether it lists any.
    """

    hashes: Mapping[str, str]
    gone: list[str]
    changed: list[str]
    added: list[str]
    listed: bool


def compare_files(folder: Path, *, below: int | None = None, known: Mapping[str, str] | None = None) -> Compared:
    """Hash the folder's files and compare them with its manifest; without a list, hash what the content hash is of.

    below: only files of fewer bytes. known: hashes of files that were read before.
    """
    manifest = read_manifest(folder)
    listed = manifest.files if manifest else None
    if listed is not None:
        names = [name for name in listed if is_file(folder / name)]
    else:
        is_model = is_file(folder / "config.json") and holds_safetensors(folder)
        names = Checkpoint.open(folder).content_files() if is_model else []
    hashes = dict(known or {})
    wanted = [n for n in names if n not in hashes and (below is None or (folder / n).stat().st_size < below)]
    hashes.update(file_hashes(folder, wanted))
    if listed is None:
        return Compared(hashes=hashes, gone=[], changed=[], added=[], listed=False)
    return Compared(
        hashes=hashes,
        gone=sorted(set(listed) - set(names)),
        changed=sorted(name for name in names if name in hashes and hashes[name] != listed[name]),
        added=[name for name in names_in(folder) if name not in listed],
        listed=True,
    )


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A folder whose files are as they were published. hashes: by name. note: for the user, or None."""

    hashes: Mapping[str, str]
    note: str | None

    def content_sha256(self, checkpoint: Checkpoint) -> str:
        """`Checkpoint.content_sha256`, of what was read here."""
        return content_of(self.hashes, checkpoint.content_files())


# Small files are compared before anything else is done, so that no message is about what a damaged one says.
SMALL_BYTES = 64 << 20


def check_files(folder: Path, *, below: int | None = None, known: Mapping[str, str] | None = None) -> Checked:
    """Read the folder's files and refuse it unless they are those that its manifest lists. See `compare_files`.

    Raises ArtifactError that names the file which is gone, differs, or was added and would be read.
    """
    found = compare_files(folder, below=below, known=known)
    again = "fetch or make the artifact again"
    if found.gone:
        raise ArtifactError(f"{folder}: {found.gone[0]} is gone, which {MANIFEST} lists; {again}")
    added = [name for name in found.added if "/" not in name and is_read(name)]
    if added:
        raise ArtifactError(
            f"{folder}: {added[0]} was added since the artifact was published and would be read; move it elsewhere"
        )
    if found.changed:
        name = found.changed[0]
        raise ArtifactError(
            f"{folder}: {name} is not what was published (its sha256 begins with {found.hashes[name][:12]}): it was "
            f"damaged or changed; {again}"
        )
    is_older = not found.listed and is_file(folder / MANIFEST)
    note = f"{folder}: its {MANIFEST}, of an older version, lists no hashes, so its files were not compared"
    return Checked(hashes=found.hashes, note=note if is_older else None)


def is_read(name: str) -> bool:
    """Whether a file of this name in a model folder changes what is computed."""
    return any(fnmatch(name, pattern) for pattern in (*_TELLING, *CARRIED) if pattern not in _LEGAL)
