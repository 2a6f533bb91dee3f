"""In CI a skip that nobody foresaw fails the run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
TESTS = """
import pytest
def test_one(): pass
def test_two(): pytest.skip({reason!r})
"""


@pytest.mark.parametrize(
    ("reason", "ci", "code"),
    [("NO CUDA DEVICE: x", "1", 0), ("could not import 'onnx'", "1", 1), ("could not import 'onnx'", "0", 0)],
)
def test_a_skip_must_be_on_the_list(reason: str, ci: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "test_x.py").write_text(TESTS.format(reason=reason))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    environment = {
        **os.environ,
        "COMPRESS_CI": ci,
        "PYTHONPATH": os.pathsep.join([str(CONFTEST.parents[1]), *sys.path]),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == code, done.stdout
    assert ("not accepted" in done.stdout) == bool(code)
