"""What a workspace holds: artifacts, who was made from whom, what judged them, what may go."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.artifact import BUNDLED, MANIFEST, read_manifest
from compress.errors import CompressError
from compress.files import is_file
from compress.output import is_scratch

# Artifacts that an export made on its way lie in a folder of their own.
_PLACES = ("*", "for-export/*")


@dataclass(frozen=True, kw_only=True)
class Item:
    """An artifact. made: what the stage made of it, in a word. parent: on disk, or as the manifest names it. bytes: of
    all its files. time: of its publishing, seconds since 1970. reports: briefs of its evaluations, the oldest first."""

    folder: Path
    stage: str
    made: str
    parent: str
    bytes: int
    time: float
    reports: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self, workspace: Path) -> dict[str, Any]:
        return {
            "path": self.folder.relative_to(workspace).as_posix(),
            "stage": self.stage,
            "made": self.made,
            "parent": self.parent,
            "bytes": self.bytes,
            "published": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.time)),
            "scores": scores(self.reports),
            "verdict": verdict(self.reports),
        }


def items(workspace: Path) -> tuple[list[Item], list[str]]:
    """The workspace's artifacts, the newest last, and a note on each folder whose manifest cannot be read."""
    found, notes = [], []
    paths = [p for place in _PLACES for p in workspace.glob(f"{place}/{MANIFEST}")]
    for path in sorted(paths):
        if not is_file(path) or is_scratch(path.parent):
            continue
        try:
            found.append(_item(path.parent))
        except CompressError as e:
            notes.append(f"{path.parent} is passed over: {e}")
    return sorted(found, key=lambda item: (item.time, item.folder.name)), notes


def _item(folder: Path) -> Item:
    from evaluators.memory import recalled

    manifest = read_manifest(folder)
    assert manifest is not None
    record = manifest.record
    parent = str(record["parent"]["path"])
    return Item(
        folder=folder,
        stage=record["stage"],
        made=_made(record),
        parent=parent if parent == BUNDLED else os.path.normpath(os.path.join(os.path.realpath(folder), parent)),
        bytes=sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file()),
        time=(folder / MANIFEST).stat().st_mtime,
        reports=recalled(folder),
    )


def _made(record: Mapping[str, Any]) -> str:
    """`w4g128`, `w8a8`, `orin edge`, `10.2 M parameters`: what tells artifacts of one stage apart."""
    options = record.get("options", {})
    scheme = options.get("scheme")
    if record["stage"] == "export":
        return f"{record.get('target', '?')} {record.get('format', '?')}"
    if isinstance(scheme, dict):
        symmetric = "-sym" if scheme.get("symmetric") else ""
        return f"w{scheme.get('num_bits')}g{scheme.get('group_size')}{symmetric} {options.get('effort', '')}".strip()
    if isinstance(scheme, str):
        return scheme
    after = record.get("parameters", {}).get("after")
    if after:
        return f"{after / 1e6:.1f} M parameters"
    tokens = record.get("tokens")
    return f"{tokens:,} tokens" if isinstance(tokens, int) else ""


def scores(reports: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The figures of the last evaluation: recovery of perplexity, mean KL, share of equal top tokens."""
    return {} if not reports else {k: v for k, v in reports[-1]["metrics"].items() if isinstance(v, int | float)}


def verdict(reports: Sequence[Mapping[str, Any]]) -> str | None:
    """The outcome of the last evaluation that had a gate, with its threshold."""
    gated = [r for r in reports if r.get("outcome")]
    return f"{gated[-1]['outcome']} at {gated[-1]['gate']['threshold']:.1%}" if gated else None


def children(found: Sequence[Item], item: Item) -> list[Item]:
    """Those made from an artifact."""
    mine = os.path.realpath(item.folder)
    return [other for other in found if other.parent == mine]


def tree(found: Sequence[Item]) -> Iterator[tuple[str, Item | str]]:
    """The lineage, depth first: what to print before each line, and an artifact or the name of an original."""
    here = {os.path.realpath(item.folder) for item in found}
    originals = dict.fromkeys(item.parent for item in found if item.parent not in here)
    for original in originals:
        there = original == BUNDLED or Path(original).exists()
        yield "", original if there else f"{original} (gone)"
        yield from _below([i for i in found if i.parent == original], found, "")


def _below(level: Sequence[Item], found: Sequence[Item], before: str) -> Iterator[tuple[str, Item | str]]:
    for position, item in enumerate(level):
        last = position == len(level) - 1
        yield f"{before}{'└─ ' if last else '├─ '}", item
        yield from _below(children(found, item), found, f"{before}{'   ' if last else '│  '}")
