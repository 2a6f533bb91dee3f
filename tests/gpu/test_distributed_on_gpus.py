"""Two processes with a GPU each make what one process with one GPU makes, bit for bit; sharded training is one's."""

import csv
import json
import os
import subprocess
import sys
from importlib.util import find_spec
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


# How a student is shared out, and `memory.ROOM`: 0 shares the teacher as well.
SHARED = {"FSDP2": ("fsdp", 0.0), "FSDP2 with room": ("fsdp", 0.6), "ZeRO-3": ("deepspeed", 0.0)}
HERE = [way for way, (engine, _) in SHARED.items() if engine == "fsdp" or find_spec("deepspeed")]


@pytest.fixture(scope="module")
def curves(save_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Losses of one GPU, and of `WORLD` by each way, in float32; these runs are killed at step 5 and gone on with."""
    folder = tmp_path_factory.mktemp("shared")
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    asked = {
        "teacher": str(save_model(folder / "teacher", **sizes, num_hidden_layers=3)),
        "student": str(save_model(folder / "student", **sizes, num_hidden_layers=2)),
        "data": [str(calibration_data.default_calibration())], "tokens": 8 * 16 * 64, "seq_len": 64, "batch": 16,
        "micro_batch": 4, "rate": 1e-3, "ce": 0.2, "checkpoint_steps": 2, "device": "cuda",
    }  # fmt: skip
    record = distill(request_of(asked, folder / "one")).record
    outs = [folder / way for way in HERE]
    what = {
        "processes": WORLD, "request": asked, "outs": list(map(str, outs)), "kills": [[5]] * len(outs),
        "more": [{"engine": SHARED[way][0]} for way in HERE], "room": [SHARED[way][1] for way in HERE],
    }  # fmt: skip
    # DeepSpeed asks for devices when it is imported, which must not start CUDA in a process that is to be forked
    env = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    script = Path(__file__).parents[1] / "compress/distill/killed.py"
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(what)], capture_output=True, text=True, timeout=500, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    codes = json.loads(done.stdout.splitlines()[-1])
    assert [(first[0], last) for first, last in codes] == [(-9, [0] * WORLD)] * len(outs), done.stderr[-3000:]
    found = {out.name: list(csv.DictReader((out / "training.csv").open())) for out in outs}
    losses = {way: [float(row["loss"]) for row in rows] for way, rows in found.items()}
    return {**losses, "one": [float(row["loss"]) for row in record["curve"]]}


@pytest.mark.parametrize("way", SHARED)
def test_sharded_training_is_that_of_one_gpu_and_goes_on(curves: dict[str, list[float]], way: str) -> None:
    if way not in curves:
        pytest.skip("NO DEEPSPEED: --engine deepspeed was not tested")
    alone = curves["one"]
    assert len(alone) == len(curves[way]) == 8 and alone[-1] < alone[0]
    assert curves[way] == pytest.approx(alone, rel=2e-3)
