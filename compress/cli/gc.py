"""`compress gc`: what of the workspace can go, and, with `--yes`, its removal. `compress.output` removes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from compress.cli.help import Command
from compress.cli.holdings import Item, children
from compress.errors import CompressError, ConfigError


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something that could go. why: in words. kind: artifact, leftover or reports."""

    path: Path
    kind: str
    why: str
    bytes: int


@click.command("gc", cls=Command)
@click.argument("artifacts", nargs=-1, type=click.Path(path_type=Path))
@click.option("--yes", is_flag=True, help="Remove what is listed; without, nothing is touched.")
@click.option("--json", "as_json", is_flag=True, help="Print as one JSON object.")
def command(artifacts: tuple[Path, ...], yes: bool, as_json: bool) -> None:
    """List what of ./artifacts can go, and remove it with --yes.

    \b
      compress gc                       leftovers of killed runs, and what no artifact needs
      compress gc artifacts/old --yes   and an artifact of that name

    An artifact goes only when it is named, is not the newest, and nothing in the workspace was made from it. Only files
    go that its manifest lists, unchanged; a run that still works keeps its scratch.
    """
    from compress.cli.holdings import items
    from compress.workspace import WORKSPACE

    found, notes = items(WORKSPACE)
    going = candidates(WORKSPACE, found) if not artifacts else [named(path, found) for path in artifacts]
    gone: list[Candidate] = []
    if yes:
        for candidate in going:
            try:
                left = _remove(candidate)
            except CompressError as e:
                left = [str(e)]
            notes += left
            gone += [] if left else [candidate]
    if as_json:
        rows = [{"path": str(c.path), "kind": c.kind, "why": c.why, "bytes": c.bytes, "gone": c in gone} for c in going]
        print(json.dumps({"workspace": str(WORKSPACE), "could_go": rows, "notes": notes}, indent=2))
        return
    for candidate in going:
        print(f"{candidate.path}  {candidate.bytes / 1e6:.1f} MB, {candidate.why}{': removed' * (candidate in gone)}")
    size = sum(c.bytes for c in (gone if yes else going)) / 1e6
    if yes:
        print(f"{len(gone)} removed, {size:.1f} MB")
    else:
        print(f"{len(going)} could go, {size:.1f} MB{'; pass --yes to remove them' if going else ''}")
    for note in notes:
        print(f"note: {note}")


def candidates(workspace: Path, found: Sequence[Item]) -> list[Candidate]:
    """What nothing needs: leftovers of runs, evaluations of what is gone, codes whose export is gone."""
    from compress.output import leftovers
    from evaluators.memory import forgotten

    out = []
    for folder in (workspace, workspace / "for-export"):
        for path in leftovers(folder):
            killed = path.name.endswith(".partial")
            why = "an unfinished run, which the same command would go on with" if killed else "replaced by a newer one"
            out.append(Candidate(path=path, kind="leftover", why=why, bytes=_size(path)))
        for path in forgotten(folder):
            out.append(
                Candidate(path=path, kind="reports", why="evaluations of an artifact that is gone", bytes=_size(path))
            )
    for item in found:
        if item.folder.parent.name == "for-export" and not children(found, item):
            why = "codes made for an export that is gone"
            out.append(Candidate(path=item.folder, kind="artifact", why=why, bytes=item.bytes))
    return out


def named(path: Path, found: Sequence[Item]) -> Candidate:
    """The artifact at a path, if it may go. ConfigError that says what needs it."""
    item = next((i for i in found if os.path.realpath(i.folder) == os.path.realpath(path)), None)
    if item is None:
        raise ConfigError(f"{path} is no artifact of the workspace; `compress status` lists them")
    needing = children(found, item)
    if needing:
        raise ConfigError(
            f"{path} is needed: {needing[0].folder} was made from it; remove that first, if you do not want it"
        )
    if item is found[-1]:
        raise ConfigError(f"{path} is the newest artifact, which commands take by default; make or keep another first")
    return Candidate(path=item.folder, kind="artifact", why="nothing was made from it", bytes=item.bytes)


def _remove(candidate: Candidate) -> list[str]:
    from compress.output import remove
    from evaluators.memory import forget

    return forget(candidate.path) if candidate.kind == "reports" else remove(candidate.path)


def _size(folder: Path) -> int:
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
