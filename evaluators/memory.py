"""What is kept of an artifact's evaluations, and what is kept of other artifacts'.

A published artifact never changes, so they lie beside it: `NAME.reports/`, a file for each text and gate. A file says
which artifact it is about, by the hash of its manifest, so that what another one of that name was judged is not taken
for its successor's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compress.artifact import MANIFEST, read_manifest
from compress.errors import CompressError, reason
from compress.files import file_sha256, is_file, json_bytes, read_json, write_bytes_atomically
from compress.output import is_scratch
from evaluators.results import Report

KIND = "evaluation"


def brief(report: Report) -> dict[str, Any]:
    """What a manifest keeps of a report: enough to compare candidates by, nothing that changes with time."""
    kept = ("perplexity", "kl_mean", "kl_99.9", "top1_agreement", "perplexity_recovery")
    return {
        "kind": KIND,
        "reference_sha256": report.reference.sha256,
        "text": {k: v for k, v in report.text.items() if k != "source"},
        "bits_per_weight": report.candidate.bits_per_weight,
        "weight_bytes": report.candidate.weight_bytes,
        "metrics": {m.name: m.value for m in report.metrics if m.name in kept or m.name.endswith("_acc")},
        "recovery": {v.metric: asdict(v.recovery) for v in report.verdicts},
        "gate": dict(report.gate) if report.gate else None,
        "outcome": report.outcome,
        **({"kv_cache": report.candidate.kv_cache} if report.candidate.kv_cache else {}),
    }


def reports_folder(artifact: Path) -> Path:
    """Where the evaluations of an artifact lie."""
    real = artifact.resolve()
    return real.with_name(f"{real.name}.reports")


def remember(artifact: Path, report: Report) -> str | None:
    """Keep the brief beside the artifact, in place of an earlier one on the same text, gate and KV cache.

    A folder without a manifest is no artifact and nothing is kept. Returns a note when something could not be.
    """
    if not is_file(artifact / MANIFEST):
        return None
    kept = json.loads(json.dumps({**brief(report), "artifact": file_sha256(artifact / MANIFEST)}))
    names = ("kind", "reference_sha256", "text", "gate", "kv_cache")
    key = json_bytes([kept[k] for k in names if k in kept])
    folder = reports_folder(artifact)
    path = folder / f"{hashlib.sha256(key).hexdigest()[:16]}.json"
    try:
        folder.mkdir(exist_ok=True)
        if path.exists() and _read(path) is None:
            return f"the evaluation was not kept: {path} is in the way and is no evaluation"
        write_bytes_atomically(path, json_bytes(kept))
    except OSError as e:
        return f"the evaluation was not kept in {folder}: {reason(e)}"
    return None


def recalled(artifact: Path) -> list[dict[str, Any]]:
    """The evaluations of this very artifact, also those that older versions kept in its manifest."""
    manifest = read_manifest(artifact)
    if manifest is None:
        return []
    mine = file_sha256(artifact / MANIFEST)
    found = [_read(path) for path in sorted(reports_folder(artifact).glob("*.json"))]
    return [*manifest.reports, *(r for r in found if r is not None and r["artifact"] == mine)]


def _read(path: Path) -> dict[str, Any] | None:
    """One kept evaluation, or None for a file that is not."""
    try:
        value = read_json(path)
    except CompressError:
        return None
    shapes = {"text": dict, "metrics": dict, "artifact": str, "reference_sha256": str}
    is_ours = value.get("kind") == KIND and all(isinstance(value.get(k), kind) for k, kind in shapes.items())
    return value if is_ours else None


def forgotten(workspace: Path) -> list[Path]:
    """Folders of evaluations in a workspace whose artifact is gone."""
    folders = sorted(p for p in workspace.glob("*.reports") if p.is_dir() and not p.is_symlink())
    return [p for p in folders if not is_file(p.with_name(p.name.removesuffix(".reports")) / MANIFEST)]


def forget(folder: Path) -> list[str]:
    """Remove the evaluations in a folder, and it, if nothing else lies there; returns a note on what does."""
    for path in sorted(folder.glob("*.json")):
        if _read(path) is not None:
            path.unlink()
    left = sorted(p.name for p in folder.iterdir())
    if left:
        return [f"{folder} was not removed: it holds {', '.join(left[:5])}, which is no evaluation"]
    folder.rmdir()
    return []


def others(report: Report, workspace: Path) -> tuple[list[dict[str, Any]], Sequence[str]]:
    """Briefs of the workspace's other artifacts that were judged against the same reference on the same text.

    And a note for each artifact whose manifest cannot be read.
    """
    mine = brief(report)
    out, notes = [], []
    for path in sorted(workspace.glob(f"*/{MANIFEST}")):
        if path.parent.resolve() == Path(report.candidate.path).resolve() or is_scratch(path.parent):
            continue
        try:
            kept = recalled(path.parent)
        except CompressError as e:
            notes.append(f"{path.parent} was left out: {e}")
            continue
        found = [r for r in kept if all(r.get(key) == mine[key] for key in ("reference_sha256", "text"))]
        if found:
            out.append({**found[-1], "path": path.parent.name})
    return out, notes
