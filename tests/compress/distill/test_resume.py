"""Killed with SIGKILL at random steps, a run goes on bit for bit (loss curve, artifact), in one process and in more."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ZERO = pytest.mark.skipif(find_spec("deepspeed") is None, reason="NO DEEPSPEED: --engine deepspeed was not tested")
SCRIPT = Path(__file__).with_name("killed.py")


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def killed(asked: dict[str, Any]) -> list[list[list[int]]]:
    found = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(asked)], capture_output=True, text=True, timeout=600
    )
    assert found.returncode == 0, found.stderr[-3000:]
    codes: list[list[list[int]]] = json.loads(found.stdout.splitlines()[-1])
    assert all(last == [0] * asked["processes"] for *_, last in codes), found.stderr[-3000:]
    return codes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "more"),
    [
        (1, {"isolate": True, "ce": 0.1, "hidden": 0.1, "on_policy": 0.25}),
        (2, {"engine": "ddp", "compress_gradients": 2}),
        (2, {"engine": "ddp", "compress_gradients": "bf16"}),
        (2, {"engine": "fsdp", "ce": 0.1, "hidden": 0.1, "on_policy": 0.25}),
        (4, {"engine": "fsdp"}),
        pytest.param(2, {"engine": "deepspeed", "ce": 0.1, "hidden": 0.1, "on_policy": 0.25}, marks=ZERO),
    ],
    ids=["one process", "two, PowerSGD", "two, bfloat16 gradients", "two, FSDP2", "four, FSDP2", "two, ZeRO-3"],
)
def test_killed_and_resumed(
    tmp_path: Path, pair: tuple[Path, Path], prose: Callable[..., Path], processes: int, more: dict[str, Any]
) -> None:
    chance = random.Random(f"{processes} {more}")
    kills = sorted(chance.sample(range(3, 12), 2))
    asked = {
        "processes": processes,
        "room": [0.6, 0.0],  # where there is room to keep weights whole or not, the same bits
        "outs": [str(tmp_path / "whole"), str(tmp_path / "killed")],
        "kills": [[], kills],
        "request": {
            "teacher": str(pair[0]), "student": str(pair[1]), "data": [str(prose(120))], "tokens": 12 * 8 * 24,
            "seq_len": 24, "batch": 8, "micro_batch": 2, "checkpoint_steps": 2, "rate": 1e-3, "watch_tokens": 96,
            "watch": str(prose(9, 5)), "watch_every": 4, **more,
        },
    }  # fmt: skip
    codes = killed(asked)
    assert [run[0] for run in codes[1]] == [-9, -9, 0], codes
    whole, resumed = files(tmp_path / "whole"), files(tmp_path / "killed")
    assert whole["training.csv"].count(b"\n") == 13
    assert whole == resumed
    assert not list(tmp_path.glob(".*partial"))
    record = json.loads(whole["compress.json"])["lineage"][0]
    if "compress_gradients" in more:
        assert 0 < record["gradient_bytes"]["sent"] < 0.9 * record["gradient_bytes"]["uncompressed"]
    if more.get("compress_gradients") == "bf16":
        assert 2 * record["gradient_bytes"]["sent"] == record["gradient_bytes"]["uncompressed"]
