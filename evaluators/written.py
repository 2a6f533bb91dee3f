"""The files of a report: one for each reader, in one folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.files import write_bytes_atomically
from evaluators.report import to_json, to_junit, to_markdown
from evaluators.results import Report


def write_reports(report: Report, folder: Path, others: Sequence[dict[str, Any]] = ()) -> tuple[list[Path], str | None]:
    """Write report.json, junit.xml, summary.md and index.html, each atomically.

    Returns the files, and a note when the page could not be drawn because matplotlib is missing.
    """
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
