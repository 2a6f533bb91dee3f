"""The environment of Edge-LLM's exporter: where it lies, when it is complete, and what is said when it is not."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from compress.errors import CompressError, ConfigError
from compress.files import json_bytes
from compress.lock import locked
from exporters.edge import env as edge_env


def test_place_follows_xdg_and_python() -> None:
    folder = edge_env.cache_folder({"XDG_CACHE_HOME": "/somewhere"})
    version = f"{sys.version_info[0]}{sys.version_info[1]}"
    assert folder == Path(f"/somewhere/compress/edge-{edge_env.VERSION}-py{version}")


def test_only_a_stamp_of_these_pins_counts(tmp_path: Path) -> None:
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    folder = edge_env.cache_folder(environ)
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    assert edge_env.ready(environ) is None
    (folder / edge_env.STAMP).write_bytes(json_bytes({"pins": {**edge_env.PINS, "onnx": "1.0"}, "versions": {}}))
    assert edge_env.ready(environ) is None
    (folder / edge_env.STAMP).write_bytes(json_bytes({"pins": edge_env.PINS, "versions": {"torch": "2.13.0+cpu"}}))
    found = edge_env.ready(environ)
    assert found is not None and found.python == folder / "bin" / "python" and found.versions["torch"] == "2.13.0+cpu"


def test_a_named_environment_is_checked_not_trusted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no bin/python there"):
        edge_env.ready({"COMPRESS_EDGE_ENV": str(tmp_path)})
    own = Path(sys.prefix)  # ours has other versions: that is why the exporter cannot live in it
    with pytest.raises(
        ConfigError, match=r"has tensorrt-edgellm \(none\), but 0.11.0 is needed; .*pip install tensorrt"
    ):
        edge_env.ready({"COMPRESS_EDGE_ENV": str(own)})


def test_failed_installation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real venv and a real pip that may look nowhere."""
    environ = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "COMPRESS_TORCH_ARGS": "--no-index --find-links /nowhere"}
    environ |= {"PIP_FIND_LINKS": "/nowhere", "PIP_NO_INDEX": "1"}
    monkeypatch.delenv("COMPRESS_EDGE_ENV", raising=False)
    environ.pop("COMPRESS_EDGE_ENV", None)
    said: list[str] = []
    with pytest.raises(ConfigError, match="pip could not install torch==2.13.0 .*COMPRESS_TORCH_ARGS"):
        edge_env.ensure(said.append, environ)
    assert said[:2] == [
        f"making an environment for TensorRT Edge-LLM {edge_env.VERSION} (once)",
        "pip install torch==2.13.0",
    ]
    assert list((tmp_path / "compress").iterdir()) == []


def test_torch_comes_first_with_its_own_arguments() -> None:
    first, second = edge_env.install_steps({"COMPRESS_TORCH_ARGS": "--index-url 'a b'"})
    assert first == (["torch==2.13.0"], ["--index-url", "a b"])
    assert second[0][0] == f"tensorrt-edgellm[export]=={edge_env.VERSION}" and second[1] == []
    assert "numpy==2.2.6" in second[0] and not any(r.startswith("torch==") for r in second[0])


def test_two_makers_wait_for_each_other(tmp_path: Path) -> None:
    said: list[str] = []
    order: list[str] = []
    lock = tmp_path / "lock"

    def second() -> None:
        with locked(lock, "the environment", wait=said.append):
            order.append("second")

    with locked(lock, "the environment", wait=said.append):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(timeout=0.3)
        order.append("first")
    thread.join(timeout=5)
    assert order == ["first", "second"] and len(said) == 1


def test_stream_passes_lines_keeps_a_log_and_hides_our_packages(tmp_path: Path) -> None:
    code = (
        "import os, sys; print('one'); print('two', file=sys.stderr); print(os.environ.get('PYTHONPATH')); sys.exit(3)"
    )
    said: list[str] = []
    environ = edge_env.clean_environ({**os.environ, "PYTHONPATH": "/ours", "PYTHONUNBUFFERED": "1"})
    status, tail = edge_env.stream([sys.executable, "-c", code], say=said.append, environ=environ, log=tmp_path / "log")
    assert status == 3 and tail == said and sorted(said) == ["None", "one", "two"]
    assert (tmp_path / "log").read_text().splitlines() == tail


def test_reason_is_the_line_that_says_why() -> None:
    tail = ["ERROR: first", "ERROR: second", "done"]
    assert edge_env.reason(tail) == "ERROR: first"
    failed = subprocess.run([sys.executable, "-c", "{}['x']"], capture_output=True, text=True, check=False)
    assert edge_env.reason(failed.stderr.splitlines()) == "KeyError: 'x'"
    assert edge_env.reason([]) == "no message"


def test_full_disk_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_env, "DISK_BYTES", {"cpu": 10**18, "cuda": 10**18})
    with pytest.raises(ConfigError, match=r"GB free, and .* needs about 1000000000.0; .*XDG_CACHE_HOME"):
        edge_env.check_disk(tmp_path)


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("Traceback\nOSError: [Errno 28] No space left on device", "the disk is full"),
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", "memory does not suffice"),
    ],
    ids=["disk", "memory"],
)
def test_a_program_that_ran_out_of_room_is_not_called_unsupported(output: str, says: str) -> None:
    with pytest.raises(CompressError, match=says):
        edge_env.refuse_full(output)
    edge_env.refuse_full("ValueError: unknown architecture")
