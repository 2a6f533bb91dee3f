"""What an artifact's manifest keeps of its evaluations, and what other artifacts' say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.artifact import Manifest, read_manifest, write_manifest
from compress.files import read_json
from evaluators.results import Report

if TYPE_CHECKING:
    pass


def brief(report: Report) -> dict[str, Any]:
    """What a manifest keeps of a report: enough to compare candidates by, nothing that changes with time."""
    kept = ("perplexity", "kl_mean", "top1_agreement", "perplexity_recovery")
    return {
        "kind": "evaluation",
        "reference_sha256": report.reference.sha256,
        "text": {k: v for k, v in report.text.items() if k != "source"},
        "bits_per_weight": report.candidate.bits_per_weight,
        "weight_bytes": report.candidate.weight_bytes,
        "metrics": {m.name: m.value for m in report.metrics if m.name in kept or m.name.endswith("_acc")},
        "gate": dict(report.gate) if report.gate else None,
        "outcome": report.outcome,
    }


def remember(folder: Path, report: Report) -> bool:
    """Put the brief into the candidate's manifest, in place of an earlier one on the same text and gate."""
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    new = json.loads(json.dumps(brief(report)))
    old = [
        r for r in manifest.reports
        if r.get("kind") != "evaluation" or r.get("text") != new["text"] or r.get("gate") != new["gate"]
    ]  # fmt: skip
    try:
        write_manifest(folder, Manifest(lineage=manifest.lineage, reports=[*old, new]))
    except OSError:
        return False
    return True


def others(report: Report, workspace: Path) -> list[dict[str, Any]]:
    """Briefs of the workspace's other artifacts that were judged against the same reference on the same text."""
    mine = brief(report)
    out = []
    for path in sorted(workspace.glob("*/compress.json")):
        if path.parent.resolve() == Path(report.candidate.path).resolve():
            continue
        found = [
            r for r in read_json(path).get("reports", [])
            if r.get("reference_sha256") == mine["reference_sha256"] and r.get("text") == mine["text"]
        ]  # fmt: skip
        if found:
            out.append({**found[-1], "path": path.parent.name})
    return out
