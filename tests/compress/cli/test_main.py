"""The command line as a stranger uses it: what it takes by itself, its exit codes, where its output goes."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import compress.workspace as compress_workspace
from compress.cli.main import main
from compress.errors import ArtifactError, Interrupted


@pytest.fixture
def compress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> Result:
        return CliRunner().invoke(main, [str(a) for a in args], catch_exceptions=False)

    return run


SMALL = ("--samples", "2", "--seq-len", "128")


def test_the_three_commands_chain_with_no_arguments(compress: Any, tmp_path: Path) -> None:
    made = compress("awq", "--bits", "4", *SMALL)
    assert made.exit_code == 0, made.output
    assert "the bundled reference model (the workspace is empty)" in made.stderr
    assert "wrote artifacts/reference-lm-awq-w4g128/" in made.stdout and "worst layers" in made.stdout
    assert "block 6/6" in made.stderr and "peak memory" in made.stderr
    seen = compress("inspect")
    assert "awq from bundled:reference_lm" in seen.stdout and "42 layers" in seen.stdout
    judged = compress("evaluate", "--max-tokens", "2048", "--gate", "0.98", "--json")
    assert judged.exit_code == 4, "4 windows of 512 tokens are too few to judge by"
    result = json.loads(judged.stdout)
    measured = {m["name"]: m for m in result["metrics"]}
    assert 0.85 < result["verdicts"][0]["recovery"]["value"] < 1 and measured["perplexity"]["reference"] > 5
    assert 4.5 < result["candidate"]["bits_per_weight"] < 6.5 and 15.9 < result["reference"]["bits_per_weight"] < 16.1
    again = compress("awq", *SMALL)
    assert again.exit_code == 1 and "exists already; pass --force" in again.stderr
    finer = compress("awq", "--group-size", "64", "--effort", "fast", *SMALL, "--json")
    assert "from which artifacts/reference-lm-awq-w4g128 was made" in finer.stderr
    record = json.loads(finer.stdout)["record"]
    assert record["options"]["scheme"]["group_size"] == 64 and record["parent"]["path"] == "bundled:reference_lm"


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("awq", "nowhere"), 1, "nowhere: no such folder, and not a hub id"),
        (("awq", "--bits", "8", "--asym"), 1, "use `compress awq --bits 8 --sym`"),
        (("awq", "--bits", "16"), 1, "use `compress awq --bits 4` or `compress awq --bits 8`"),
        (("awq", "--group-size", "0"), 2, "choose auto, 128, 64 or 32"),
        (("awq", "--group-size", "-1"), 2, "choose auto, 128, 64 or 32"),
        (("awq", "--group-size", "256"), 1, "--group-size 128 or --group-size 64 or --group-size 32 divides"),
        (("awq", "--bits", "four"), 2, "is not a valid integer"),
        (("awq", "--samples", "0"), 2, "--samples"),
        (("awq", "--calib", "missing.txt"), 1, "missing.txt"),
        (("awq", "some-org/some-model"), 1, "the hub did not give it"),
        (("inspect", "nowhere"), 1, "no such folder"),
        (("evaluate", "nowhere"), 1, "no such folder"),
        (("evalute",), 2, "No such command 'evalute'. Did you mean 'evaluate'?"),
        (("frobnicate",), 2, "No such command 'frobnicate'."),
        (
            ("evaluate",),
            1,
            "nothing made in ./artifacts can be judged; make something, as with `compress awq --bits 4`",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_sentence(compress: Any, args: tuple[str, ...], code: int, message: str) -> None:
    result = compress(*args)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output
    if code == 1:
        assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1


def test_evaluating_on_the_calibration_text_is_refused(compress: Any, in_workspace: Path) -> None:
    result = compress("evaluate", "--data", "calib.txt", "--context", "64")
    assert result.exit_code == 1 and "was calibrated on; pass other text" in result.stderr


def test_original_against_itself_passes(compress: Any, reference_model: Path) -> None:
    args = ("evaluate", str(reference_model), "--reference", str(reference_model), "--max-tokens", "1024")
    result = compress(*args, "--gate", "0.98")
    assert result.exit_code == 0 and "perplexity: 100.00% of the reference" in result.stdout and "PASS" in result.stdout
    no_reference = compress("evaluate", str(reference_model))
    assert no_reference.exit_code == 1 and "pass --reference MODEL" in no_reference.stderr


class _Surprise:
    """Stands for a command; raises what nobody foresaw."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ValueError("odd\n\x1b[31mname"), 70, r"a bug of compress (ValueError: odd \u001b[31mname); please report it"),
        (OSError(28, "No space left on device", "/x/y"), 1, "error: the disk is full at /x/y"),
        (
            PermissionError(13, "Permission denied", "/x/y"),
            1,
            "error: Permission denied: /x/y; the file system refused",
        ),
        (MemoryError(), 1, "memory does not suffice"),
        (ArtifactError("a\nb"), 1, "error: a b\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Interrupted("the same command goes on"), 130, "interrupted; the same command goes on\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_happens_is_one_sentence(
    compress: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, says: str
) -> None:
    monkeypatch.delenv("COMPRESS_DEBUG")
    monkeypatch.setattr(compress_workspace, "resolve", _Surprise(error))
    result = compress("inspect")
    assert result.exit_code == code and says in result.stderr and result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    if code == 70:
        report = Path(result.stderr.split("report it with ")[1].split(", which")[0])
        assert "Traceback" in report.read_text() and "test_main.py" in report.read_text()
        report.unlink()


def test_a_bug_shows_its_traceback_where_it_is_asked_for(compress: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress_workspace, "resolve", _Surprise(ValueError("odd")))
    with pytest.raises(ValueError, match="odd"):
        compress("inspect")
