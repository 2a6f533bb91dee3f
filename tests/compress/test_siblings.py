"""A foreign package called like one of ours is named, not tripped over."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compress import siblings
from compress.errors import ArtifactError

ROOT = Path(__file__).resolve().parents[2]


def test_ours_pass() -> None:
    siblings.check_siblings()


def test_a_foreign_package_in_front_is_one_sentence(tmp_path: Path) -> None:
    foreign = tmp_path / "evaluators"
    foreign.mkdir()
    (foreign / "__init__.py").write_text("raise SystemExit('this must not be imported')\n")
    code = "from compress.cli.main import main; main(['inspect', 'x'])"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    seen = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert seen.returncode == 1
    assert f"the package evaluators would come from {tmp_path} and not from {ROOT}" in seen.stderr
    assert "Traceback" not in seen.stderr and "must not be imported" not in seen.stderr


def test_a_second_owner_in_the_same_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = {name: ["compress-toolkit"] for name in siblings.SIBLINGS}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: owners)
    siblings.check_owners()
    owners["exporters"] = ["compress-toolkit", "some-exporters"]
    with pytest.raises(ArtifactError, match="exporters belongs to some-exporters as well as to compress-toolkit"):
        siblings.check_owners()
