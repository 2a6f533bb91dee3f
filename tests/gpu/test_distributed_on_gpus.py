"""Two processes with a GPU each make what one process with one GPU makes, bit for bit; sharded training is one's."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import calibration_data
from compress.distill.run import distill

sys.path[:0] = [str(Path(__file__).parents[1] / "compress"), str(Path(__file__).parents[1] / "compress/distill")]
from killed import request_of  # noqa: E402
from test_distributed import WORLD, outcome, several  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="NO TWO CUDA DEVICES: NCCL was not tested"),
]


def test_two_gpus_equal_one(build_model: Any, tmp_path: Path) -> None:
    folder = build_model()
    found = several(folder, tmp_path, "cuda")
    for effort in found[0]:
        expected = outcome(str(folder), effort, num_parts=WORLD, device="cuda")
        assert int(expected["0.o_proj.tokens"]) == 80 * 256
        for mine in found:
            assert mine[effort].keys() == expected.keys()
            assert not [key for key in expected if not torch.equal(mine[effort][key], expected[key])]


def curve(asked: dict[str, Any], out: Path, room: float) -> list[float]:
    """Losses of a run in `WORLD` processes that is killed at step 5 and gone on with."""
    script = Path(__file__).parents[1] / "compress/distill/killed.py"
    what = {"processes": WORLD, "outs": [str(out)], "kills": [[5]], "request": asked, "room": [room]}
    # DeepSpeed asks for devices when it is imported, which must not start CUDA in a process that is to be forked
    env = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(what)], capture_output=True, text=True, timeout=500, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ((first, last),) = json.loads(done.stdout.splitlines()[-1])
    assert (first[0], last) == (-9, [0] * WORLD), done.stderr[-3000:]
    return [float(row["loss"]) for row in csv.DictReader((out / "training.csv").open())]


@pytest.mark.parametrize(("engine", "room"), [("fsdp", 0.0), ("fsdp", 0.6), ("deepspeed", 0.0)])
def test_sharded_training_is_that_of_one_gpu_and_goes_on(
    build_model: Any, tmp_path: Path, engine: str, room: float
) -> None:
    """Student, and teacher without room, shared out through NCCL, in float32: the losses of one process, also when
    killed."""
    if engine == "deepspeed":
        pytest.importorskip("deepspeed", reason="NO DEEPSPEED: --engine deepspeed was not tested")
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    text = str(calibration_data.default_calibration())
    asked = {
        "teacher": str(build_model(**sizes, num_hidden_layers=3)), "data": [text],
        "student": str(build_model(**sizes, num_hidden_layers=2, name="student")), "tokens": 8 * 16 * 64, "seq_len": 64,
        "batch": 16, "micro_batch": 4, "rate": 1e-3, "ce": 0.2, "checkpoint_steps": 2, "device": "cuda",
    }  # fmt: skip
    alone = [float(r["loss"]) for r in distill(request_of(asked, tmp_path / "alone")).record["curve"]]
    killed = curve({**asked, "engine": engine}, tmp_path / "killed", room)
    assert len(alone) == len(killed) == 8 and alone[-1] < alone[0]
    assert killed == pytest.approx(alone, rel=2e-3)
