"""The same artifact with other codes: its recorded recipe run again from its parent, for a reader that needs that.

Nothing is converted from the codes at hand: rounding what was rounded already loses twice.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress import advice, calibration, tokens
from compress.artifact import parent_path, read_manifest
from compress.checkpoint import Checkpoint
from compress.devices import pick_device
from compress.errors import ArtifactError, ConfigError
from compress.quantize.awq_stage import AwqRequest, quantize_awq, request_from_record
from compress.scheme import Scheme
from compress.tell import Tell
from compress.workspace import Source, from_reference

MADE_FOR_EXPORT = "for-export"


def requantize(artifact: Path, wanted: Scheme, reader: str, out: Path, tell: Tell) -> Path:
    """Run the artifact's recorded recipe again with the `wanted` scheme, from its parent; resumes and reuses.

    Returns the folder: beside the artifact, or beside `out` where that cannot be written. Raises ArtifactError, with
    the command that helps, when the recipe or the parent is not there.
    """
    manifest = read_manifest(artifact)
    flags = _flags(wanted)
    if manifest is None:
        raise ArtifactError(
            f"{artifact}: {reader} needs {wanted.label()} codes, and it has no compress.json that says how to make "
            f"them; quantize its original: `compress awq MODEL {flags}`"
        )
    record = manifest.record
    try:
        parent = parent_path(record["parent"], artifact)
    except ArtifactError:
        raise ArtifactError(
            f"{artifact}: {reader} needs {wanted.label()} codes, and its parent {record['parent']['path']} is gone; "
            f"fetch that model and run `compress awq MODEL {flags}`"
        ) from None
    source = Source(path=parent, name=parent.name, said=str(parent), is_reference=from_reference(parent))
    home = artifact.parent if os.access(artifact.parent, os.W_OK) else out.parent
    only_symmetric = wanted.symmetric and wanted.label() == f"{_recorded_scheme(record).label()}-sym"
    # In a folder of its own: what one reader needed must not become the workspace's newest artifact.
    folder = home / MADE_FOR_EXPORT / f"{artifact.name}-{'sym' if only_symmetric else wanted.label()}"
    request = request_from_record(record, artifact, source=source, out=folder, scheme=wanted)
    why = f"{reader} needs {wanted.label()} codes and {artifact} has {_recorded_scheme(record).label()}"
    if folder.exists():
        made = read_manifest(folder)
        if made is None or not _same_recipe(made.record, record, request):
            raise ConfigError(f"{folder} exists and was made by another recipe; move or remove it, then export again")
        tell.say(f"{why}: {folder} has them, from the same recipe, and is used as it is")
        return folder
    if Checkpoint.open(parent).content_sha256() != record["parent"]["sha256"]:
        raise ArtifactError(
            f"{parent} has changed since {artifact} was made from it; put the model back, or quantize it anew: "
            f"{advice.command('awq', parent, *flags.split())}"
        )
    _check_text(request, record, artifact)
    request = replace(request, device=_device(request.device, tell))
    tell.say(f"{why}: its recipe runs again from {record['parent']['path']} into {folder}")
    outcome = quantize_awq(request, tell)
    for note in outcome.notes:
        tell.say(f"note: {note}")
    if outcome.record["calibration"]["sha256"] != record["calibration"]["sha256"]:
        tell.say(f"note: {record['calibration']['source']} gave other calibration text than when {artifact} was made")
    return folder


def _device(recorded: str, tell: Tell) -> str:
    """The device that the recipe names, or, where it is not there, the one that is."""
    try:
        return pick_device(recorded)
    except ConfigError:
        device = pick_device("auto")
        tell.say(f"note: the recipe was run on {recorded}, which is not there; it runs on {device}")
        return device


def _same_recipe(made: Mapping[str, Any], record: Mapping[str, Any], request: AwqRequest) -> bool:
    """On whatever device: sums in another order make no other recipe."""
    return (
        made.get("stage") == "awq"
        and {**made["options"], "device": None} == {**request.options(), "device": None}
        and made["parent"]["sha256"] == record["parent"]["sha256"]
        and _same_text(made["calibration"], record["calibration"])
    )


def _same_text(made: Mapping[str, Any], recorded: Mapping[str, Any]) -> bool:
    """Equal tokens; for text that is not a file (sampled, from the hub) the same source will do."""
    same_source = made["source"] == recorded["source"] and not str(recorded["source"]).startswith("file:")
    return bool(made["sha256"] == recorded["sha256"] or same_source)


def _check_text(request: AwqRequest, record: Mapping[str, Any], artifact: Path) -> None:
    """Raise ArtifactError when the calibration file holds other text than it did."""
    if request.calib is None or not str(record["calibration"]["source"]).startswith("file:"):
        return
    text = calibration.load(
        request.calib,
        tokens.load_tokenizer(request.source.path),
        num_samples=request.samples,
        seq_len=request.seq_len,
        seed=request.seed,
        model=request.source.path,
        is_reference=request.source.is_reference,
        vocab_size=2**31,
    )
    if text.sha256 != record["calibration"]["sha256"]:
        raise ArtifactError(
            f"{request.calib} is not the text that {artifact} was calibrated on; put that back, or quantize "
            f"{request.source.path} anew: "
            f"{advice.command('awq', request.source.path, '--calib', request.calib, *_flags(request.scheme).split())}"
        )


def _recorded_scheme(record: Mapping[str, Any]) -> Scheme:
    value = record["options"]["scheme"]
    return Scheme(num_bits=value["num_bits"], group_size=value["group_size"], symmetric=value["symmetric"])


def _flags(scheme: Scheme) -> str:
    return f"--bits {scheme.num_bits} --group-size {scheme.group_size}{' --sym' if scheme.symmetric else ''}"
