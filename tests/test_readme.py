"""The README and the package say the same thing."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from compress.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_command_line_in_the_readme_parses() -> None:
    """Each `compress ...` line names a command and options that exist."""
    lines = re.findall(r"^ {4}compress (\w+)(.*)$", README, flags=re.MULTILINE)
    assert len(lines) >= 3
    for name, rest in lines:
        help_text = CliRunner().invoke(main, [name, "--help"]).output
        assert "Usage" in help_text, name
        for option in re.findall(r"(--[a-z-]+)", rest.split("#")[0]):
            assert option in help_text, (name, option)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_every_make_target_in_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`make (\w+)`", README)) | set(re.findall(r"^ {4}make (\w+)", README, flags=re.M)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


@pytest.mark.slow
def test_the_wheel_holds_the_four_packages_and_their_data(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for name in (
        "compress/cli/main.py",
        "compress/formats/awq_gemm.py",
        "compress/recipes/a100-awq.toml",
        "compress/schemas/run.json",
        "exporters/__init__.py",
        "evaluators/gate.py",
        "calibration_data/self_sampled.jsonl",
        "calibration_data/held_out.jsonl",
        "calibration_data/reference_lm/model.safetensors",
    ):
        assert name in names
    assert not any(n.startswith("tests/") for n in names)
