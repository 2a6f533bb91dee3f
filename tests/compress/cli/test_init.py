"""`compress init`: what it writes is a recipe with the values asked for, and nothing is written over."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from compress.cli.main import main
from compress.cli.recipe_steps import check_fields
from compress.recipe import read_recipe, ready_recipes


@pytest.fixture
def compress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> Result:
        return CliRunner().invoke(main, ["init", *args], catch_exceptions=False)

    return run


@pytest.mark.parametrize("name", list(ready_recipes()))
def test_a_ready_recipe_with_ones_own_model_and_texts(compress: Any, name: str) -> None:
    values = ("--model", 'a "b"\\c', "--calib", "notes.txt", "--data", "held.txt", "--gate", "0.95")
    written = compress(name, *values, "-o", "mine.toml")
    assert written.exit_code == 0 and "next: compress run mine.toml --dry-run" in written.stdout
    recipe = read_recipe("mine.toml")
    check_fields(recipe)
    fields = {key: f.value for s in recipe.steps for key, f in s.fields.items() if key != "data"}
    assert recipe.model is not None and recipe.model.value == 'a "b"\\c'
    assert fields["calib"] == "notes.txt" and fields["gate"] == 0.95
    assert recipe.steps[-1].fields["data"].value == "held.txt" and recipe.steps[-1].stage == "evaluate"
    again = compress(name, "-o", "mine.toml")
    assert again.exit_code == 1 and "mine.toml exists already; pass --force" in again.stderr
    assert compress(name, "-o", "mine.toml", "--force").exit_code == 0
    assert read_recipe("mine.toml").model is None


def test_what_is_not_known_is_said(compress: Any) -> None:
    assert "which recipe? pass one of a100-auto, a100-awq" in compress().stderr
    assert "did you mean orin-awq?" in compress("orin-awk").stderr
    assert "cannot be written" in compress("lambda", "-o", "no/where.toml").stderr
