"""Where commands may write is checked first."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from compress.cli.main import main


@pytest.mark.parametrize(
    ("out", "says"),
    [("", "is the current folder"), (".", "is the current folder"), ("taken", "exists already"), ("file", "is a file")],
)
def test_an_output_is_refused_before_a_model_is_fetched(
    out: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every command that writes a folder. The model here is none of the hub's, and is not looked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").touch()
    commands = [["awq"], ["int8"], ["prune", "--depth", "1"], ["export", "--target", "cpu"]]
    for words in commands:
        done = CliRunner().invoke(main, [*words, "nobody/nothing", "-o", out])
        assert done.exit_code == 1 and says in done.stderr, (words, done.stderr)
    more = ["--data", "file", "-o", out]
    for words in (["teach", "--teacher", "nobody/nothing"], ["distill", "--student", "nobody/nothing"]):
        done = CliRunner().invoke(main, [*words, *more])
        assert done.exit_code == 1 and says in done.stderr, (words, done.stderr)
