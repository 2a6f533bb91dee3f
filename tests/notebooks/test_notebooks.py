"""Every notebook runs from its first cell to its last; what it prints is looked at where it matters."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What must be among a notebook's printed lines.
SAYS = {
    "01_quickstart": ["MB became", "of the perplexity is kept", "decoder linears"],
    "02_awq_by_hand": ["rounding to nearest loses", "of search_scale"],
    "03_reading_the_gate": ["measured below the gate", "windows: PASS in", "times less", "would tell"],
    "04_sizing_for_orin": ["8B: 8.03 B parameters", "4 bits: run peak", "weights of 4 bits"],
    "05_prune_distill_quantize": [
        "MB foreseen", "[awq] would be refused", "judge-quantized  keeps", "'awq': 'made before'",
    ],
}  # fmt: skip


def test_every_notebook_is_known() -> None:
    assert {p.stem for p in NOTEBOOKS} == set(SAYS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "committed without outputs: they are made anew"
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    printed = "".join(str(o.get("text", "")) for o in outputs if o.output_type == "stream")
    assert all(text in printed for text in SAYS[path.stem]), printed
    assert any("image/png" in o.get("data", {}) for o in outputs), "a notebook draws something"
