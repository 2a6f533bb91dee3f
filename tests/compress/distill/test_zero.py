"""DeepSpeed ZeRO-3 in two processes on a CPU trains as FSDP2 does. Kill and resume: test_resume.py."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import compress
from compress.tell import SILENT

sys.path.insert(0, str(Path(__file__).parent))
from killed import free_port  # noqa: E402

pytest.importorskip("deepspeed", reason="NO DEEPSPEED: --engine deepspeed was not tested")
SCRIPT = Path(__file__).with_name("killed.py")


def made(request: dict[str, Any], out: Path) -> tuple[list[float], dict[str, Any]]:
    """(losses, record) of a run in two processes."""
    asked = {"processes": 2, "outs": [str(out)], "kills": [[]], "request": request}
    done = subprocess.run([sys.executable, str(SCRIPT), json.dumps(asked)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1]) == [[[0, 0]]], done.stderr[-3000:]
    rows = csv.DictReader((out / "training.csv").open())
    record = json.loads((out / "compress.json").read_text(encoding="utf-8"))["lineage"][0]
    return [float(row["loss"]) for row in rows], record


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "rel"),
    [({"rate": 1e-3}, 1e-5), ({"rate": 1e-3, "dtype": "bfloat16"}, 1e-3), ({"scheme": "w4a16", "rate": 1e-2}, 1e-3)],
    ids=["float32", "bfloat16", "codes"],
)
def test_losses_are_those_of_fsdp(
    tmp_path: Path, pair: tuple[Path, Path], prose: Callable[..., Path], more: dict[str, Any], rel: float
) -> None:
    """Two passes an update; shapes of `codes` lie transposed in their file, with one group a row."""
    text = str(prose(120))
    student = pair[1]
    if "scheme" in more:
        student = tmp_path / "start"
        compress.quantize_awq(
            pair[0], student, group_size=32, effort="fast", calib=text, samples=8, seq_len=32, tell=SILENT
        )
    request = {
        "teacher": str(pair[0]), "student": str(student), "data": [text], "tokens": 8 * 8 * 24, "seq_len": 24,
        "batch": 8, "micro_batch": 2, "ce": 0.1, **more,
    }  # fmt: skip
    expected, before = made({**request, "engine": "fsdp"}, tmp_path / "fsdp")
    found, record = made({**request, "engine": "deepspeed"}, tmp_path / "deepspeed")
    assert len(found) == 8 and len(set(found)) == 8
    assert found == pytest.approx(expected, rel=rel)
    assert record["engine"] == {"kind": "deepspeed", "processes": 2}
    assert record["flops_per_token"] == before["flops_per_token"]


@pytest.mark.slow
def test_the_command_line_prints_its_json_alone(
    tmp_path: Path, pair: tuple[Path, Path], prose: Callable[..., Path]
) -> None:
    """DeepSpeed logs to standard output, wherever it is imported."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m",
        "compress", "distill", "--engine", "deepspeed", "--teacher", pair[0], "--student", pair[1], "--data", prose(60),
        "--tokens", 2 * 8 * 24, "--seq-len", 24, "--batch", 8, "--device", "cpu", "--json", "-o", tmp_path / "out",
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["record"]["engine"]["kind"] == "deepspeed"
