"""The files of a report: one for each reader, in one folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.errors import ConfigError
from compress.files import is_file, write_bytes_atomically
from evaluators.report import to_json, to_junit, to_markdown
from evaluators.results import Report

# How each file that we write is known again.
SIGNS = {
    "report.json": b'"candidate": {',
    "junit.xml": b'name="compress evaluate"',
    "summary.md": b"Accuracy gate: ",
    "index.html": b'<h1><span class="',
}


def refuse_strangers(folder: Path) -> None:
    """ConfigError when the folder holds a file of a report's name that no evaluation wrote."""
    for name, sign in SIGNS.items():
        path = folder / name
        if os.path.lexists(path) and not (is_file(path) and not path.is_symlink() and sign in path.read_bytes()):
            raise ConfigError(
                f"--report {folder}: {path} is there and is not a report of ours; move it, or choose another folder"
            )


def write_reports(report: Report, folder: Path, others: Sequence[dict[str, Any]] = ()) -> tuple[list[Path], str | None]:
    """Write report.json, junit.xml, summary.md and index.html, each atomically.

    Returns the files, and a note when the page could not be drawn because matplotlib is missing.
    """
    refuse_strangers(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {"report.json": to_json(report), "junit.xml": to_junit(report), "summary.md": to_markdown(report).encode()}
    note = None
    try:
        from evaluators.page import to_html
    except ImportError as e:
        note = f'index.html was not drawn, {e.name} is missing: pip install "compress-toolkit[report]"'
    else:
        files["index.html"] = to_html(report, others)
    for name, content in files.items():
        write_bytes_atomically(folder / name, content)
    return [folder / name for name in files], note
