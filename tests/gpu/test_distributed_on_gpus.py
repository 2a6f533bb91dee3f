"""Two processes with a GPU each make what one process with one GPU makes, bit for bit."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "compress"))
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
