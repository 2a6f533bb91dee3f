"""`compress evaluate`: what is checked before any work, and what is not lost at its end."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from compress.cli.main import main


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference_model: Path) -> Any:
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> Result:
        own = (str(reference_model), "--reference", str(reference_model), "--max-tokens", "1024", "--no-cache")
        return CliRunner().invoke(main, ["evaluate", *own, *map(str, args)], catch_exceptions=False)

    return run


@pytest.mark.parametrize("flag", ["--report", "--cache"])
def test_where_to_write_is_checked_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference_model: Path, flag: str
) -> None:
    """A file, and a place where nothing can be made; nothing is opened, not even the model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        result = CliRunner().invoke(main, ["evaluate", "no-such-model", flag, str(place)], catch_exceptions=False)
        assert result.exit_code == 1 and f"error: {flag} {place} cannot be written to" in result.stderr
    assert (tmp_path / "file").read_text(encoding="utf-8") == "x"


@pytest.mark.parametrize(("gate", "code"), [((), 1), (("--gate", "0.98"), 0)], ids=["no gate", "gate"])
def test_a_verdict_is_not_lost_with_the_report(
    evaluate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: tuple[str, ...], code: int
) -> None:
    """The disk fills up while the models run: what was found is printed, and the exit code is the gate's."""

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("evaluators.written.write_bytes_atomically", full)
    result = evaluate("--report", "report", "--json", *gate)
    assert result.exit_code == code
    assert json.loads(result.stdout)["outcome"] == ("PASS" if gate else None)
    assert "error: the report could not be written to report (No space left on device" in result.stderr


def test_progress_says_what_goes_on(evaluate: Any) -> None:
    result = evaluate()
    assert result.exit_code == 0
    assert "percent of the evaluation 100/100: comparing" in result.stderr and "peak memory" in result.stderr
