"""`compress doctor` on the machine that runs the tests: it finds what is there, and says what a lack costs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import types
from pathlib import Path

import pytest
from click.testing import CliRunner

from compress import doctor
from compress.cli.main import main


def by_name(folder: Path) -> dict[str, doctor.Check]:
    return {c.name: c for c in doctor.checks(folder)}


def test_it_finds_what_is_installed(tmp_path: Path) -> None:
    found = by_name(tmp_path)
    import torch

    assert found["torch"].state == "ok" and torch.__version__ in found["torch"].found
    assert found["transformers"].found == importlib.metadata.version("transformers")
    assert str(len(os.sched_getaffinity(0))) in found["memory"].found
    assert str(tmp_path) in found["disk"].found
    for check in found.values():
        assert check.state == "ok" or check.mend or check.name in ("GPU", "triton"), check


def test_an_absent_package_names_the_extra_and_the_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "tensorrt-rtx":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    check = by_name(tmp_path)["tensorrt-rtx"]
    assert check.state == "absent" and check.mend == 'pip install "compress-toolkit[tensorrt-rtx]"'


def test_a_package_that_does_not_import_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what Python does with a module that failed
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    check = by_name(tmp_path)["matplotlib"]
    assert check.state == "broken" and "--force-reinstall" in check.mend


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1_000_000_000))
    check = by_name(tmp_path / "not" / "there")["disk"]
    assert check.state == "broken" and "1.0 GB free" in check.found and check.mend


def test_command() -> None:
    done = CliRunner().invoke(main, ["doctor", "--json"])
    found = json.loads(done.stdout)
    assert found["ok"] == (done.exit_code == 0) == all(c["state"] != "broken" for c in found["checks"])
    assert {c["name"] for c in found["checks"]} >= {"python", "torch", "disk"}
    text = CliRunner().invoke(main, ["doctor"]).stdout
    assert "fine" in text.splitlines()[-1] and "+ python" in text
