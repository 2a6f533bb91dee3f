"""onnxruntime-genai's builder without its imports, four seconds each time: a process that has done them, and forks."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

MODULE = "onnxruntime_genai.models.builder"
SERVER = f"""
import json, os, runpy, sys, traceback
import {MODULE}
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 0
        os.chdir(asked["cwd"])
        os.environ.update(asked["env"])
        for name, place in (("out", 1), ("err", 2)):
            os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT), place)
        sys.argv = asked["argv"]
        try:
            runpy.run_module("{MODULE}", run_name="__main__", alter_sys=True)
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(bool(e.code))
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def builder_process() -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SERVER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process
    process.communicate()


@pytest.fixture
def cold_builder() -> None:
    """For a test whose builder is a process of its own, as users have it."""


@pytest.fixture(autouse=True)
def warm_builder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`exporters.genai.builder` runs the very builder with the very arguments, but as a fork."""
    if "cold_builder" in request.fixturenames:
        return

    def run(command: list[str], *, cwd: str, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", MODULE]
        process: subprocess.Popen[str] = request.getfixturevalue("builder_process")
        said = tmp_path_factory.mktemp("said")
        asked = {"argv": command[2:], "cwd": cwd, "env": env, "out": str(said / "out"), "err": str(said / "err")}
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        code = int(process.stdout.readline())
        out, err = (Path(said, name).read_text(errors="replace") for name in ("out", "err"))
        return subprocess.CompletedProcess(command, code, out, err)

    monkeypatch.setattr("exporters.genai.builder.subprocess", SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL))
