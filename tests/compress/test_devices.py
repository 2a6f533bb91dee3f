"""The device that is picked, and what is said about one that is not there."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compress.devices import described, pick_device, pick_dtype
from compress.errors import ConfigError


def test_auto_takes_the_gpu_only_where_there_is_one() -> None:
    device = pick_device("auto")
    assert device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert described("cpu") == "cpu" and pick_device("cpu") == "cpu"


def test_dtype_follows_the_device_unless_given() -> None:
    assert [pick_dtype("auto", d) for d in ("cpu", "cuda", "cuda:1")] == ["float32", "bfloat16", "bfloat16"]
    assert pick_dtype("float32", "cuda") == "float32" and pick_dtype("bfloat16", "cpu") == "bfloat16"


@pytest.mark.parametrize("asked", ["cuda:99", "gpu", "cuda:x", "mps"])
def test_a_device_that_is_not_there_is_named_with_a_way_out(asked: str) -> None:
    with pytest.raises(ConfigError, match=asked) as caught:
        pick_device(asked)
    assert "cpu" in str(caught.value)


@pytest.mark.parametrize("command", ["awq", "evaluate"])
def test_command_line_says_so_in_one_line(command: str, tmp_path: Path) -> None:
    asked = [sys.executable, "-m", "compress", command, "--device", "cuda:99"]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("error: --device cuda:99 is not")
    assert "Traceback" not in done.stderr and not any(tmp_path.iterdir())
