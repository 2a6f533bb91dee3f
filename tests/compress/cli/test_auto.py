"""`compress auto` as it is typed: the artifact, the page, the verdict, and what is refused before any work."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from compress.artifact import read_manifest
from compress.cli.main import main

SMALL = ("--samples", "8", "--seq-len", "64", "--effort", "fast", "--max-tokens", "10240")


@pytest.fixture
def compress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*args: object) -> Result:
        return CliRunner().invoke(main, [str(a) for a in args], catch_exceptions=False)

    return run


@pytest.mark.slow
def test_the_smallest_that_passes(compress: Any, valid_json: Any) -> None:
    """On the bundled model and texts, which needs nothing said; then the best of fewer bytes, which misses the gate."""
    done = compress("auto", *SMALL, "--gate", "0.9", "--tries", "2", "--report", "auto.html", "--json")
    assert done.exit_code == 0, done.output
    found = valid_json("auto", done.stdout)
    assert found["passes"] and found["gate"] == 0.9 and 1 <= len(found["tried"]) <= 2
    kept = next(one for one in found["tried"] if one["bytes"] == found["out_bytes"])
    assert kept["lower"] >= 0.9 and kept["kl"] > 0
    assert found["uniform"].keys() >= {"w4g128", "w4g32", "w8", "float16"}
    manifest = read_manifest(Path(found["out"]))
    assert manifest is not None and manifest.record == found["record"]
    assert list(Path(found["out"] + ".reports").glob("*.json")), "its verdict is kept beside it"
    report = json.loads(next(Path(found["out"] + ".reports").glob("*.json")).read_text())
    assert report["gate"]["confidence"] == 0.975, "two artifacts may be tried, so each has half of the 5 %"
    page = Path("auto.html").read_text()
    assert page.count("<svg") == 3 and "<b>passed</b>" in page and "of 90.0%, at its lower bound" in page

    shown = compress("auto", *SMALL, "--bytes", "8.3M", "--gate", "0.995", "--tries", "1", "-o", "small")
    assert shown.exit_code == 3
    assert "no artifact passes within the bytes that there are" in shown.stderr
    assert "misses the gate of 99.5% by" in shown.stdout and "all w4g32" in shown.stdout
    assert "next: compress evaluate small" in shown.stdout


def test_dry_run_says_what_there_is_to_choose_from(compress: Any) -> None:
    done = compress("auto", "--dry-run", "--bytes", "9M")
    assert done.exit_code == 0, done.output
    assert "goal: the best of at most 9.00 MB" in done.stdout and "42 linears are chosen for" in done.stdout
    assert "all w4g32: 8.61 MB" in done.stdout and not Path("artifacts").exists()
    found = json.loads(compress("auto", "--dry-run", "--target", "orin-nano", "--json").stdout)
    assert found["uniform_bytes"].keys() == {"w4g128-sym", "float16"}, "what its readers take: one scheme of codes"
    assert found["goal"] == {"gate": 0.98, "most_bytes": found["goal"]["most_bytes"]}


def test_dry_run_with_the_output_matrix(compress: Any, build_model: Any, calib_text: Path) -> None:
    """One scheme for all leaves it in float16, as everybody does; least is with it in 4 bits."""
    args = ("auto", build_model(), "--calib", calib_text, "--bytes", "1.13M", "--dry-run", "--json")
    plain, chosen = (json.loads(compress(*args, *more).stdout) for more in ((), ("--lm-head",)))
    assert chosen["uniform_bytes"] == plain["uniform_bytes"] and chosen["linears"] == plain["linears"] + 1
    assert plain["least_bytes"] - chosen["least_bytes"] > 4096 * 64 * 2 * 0.7


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--lm-head",), "--lm-head: the output matrix of reference_lm is its input embedding"),
        (("--lm-head", "--target", "orin-nano"), "takes the output matrix in float16; leave --lm-head out"),
        (("--bytes", "1M"), "1.00 MB are too few: the smallest that can be chosen takes"),
        (("--gate", "0.98", "--max-tokens", "600"), "a gate needs 20 windows of 512 tokens"),
        (("--context", "512"), "--context is about a machine; name one with --target"),
        (("--target", "moon"), "there is no such target"),
        (("--target", "orin-nano", "--format", "hf"), "the readers of orin-nano take"),
        (("--bytes", "huge"), "--bytes huge is not a size"),
        (("--data", "absent.txt"), "absent.txt"),
        (("--report", "page.txt"), "name the page to write"),
    ],
)
def test_refused_before_any_work(args: tuple[str, ...], said: str, compress: Any) -> None:
    done = compress("auto", *args)
    assert done.exit_code == 1 and said in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not Path("artifacts").exists()


def test_a_page_that_cannot_be_drawn_is_refused_before_work(compress: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    for args in (("auto", "--bytes", "9M"), ("prune", "--depth", "1")):
        done = compress(*args, "--report", "page.html")
        assert done.exit_code == 1 and 'pip install "compress-toolkit[report]"' in done.stderr
        assert not Path("artifacts").exists()


def test_the_calibration_text_judges_nothing(compress: Any, build_model: Any, calib_text: Path) -> None:
    folder = build_model()
    done = compress("auto", folder, "--calib", calib_text, "--data", calib_text)
    assert done.exit_code == 1 and "is the calibration text" in done.stderr
    copy = calib_text.with_name("copy.txt")
    copy.write_text(calib_text.read_text() + "\nand more of it\n")
    done = compress("auto", folder, "--calib", calib_text, "--data", copy, "--samples", "12", "--seq-len", "64")
    assert done.exit_code == 1 and "windows of 256 tokens, and a gate needs 20" in done.stderr
    args = ("--samples", "12", "--seq-len", "64", "--bytes", "1.13M", "--data", copy)
    done = compress("auto", folder, "--calib", calib_text, *args)
    assert done.exit_code == 1 and "is text that is calibrated on" in done.stderr and "measuring" not in done.stderr
    done = compress("auto", folder, "--calib", calib_text)
    assert done.exit_code == 1 and "no --data" in done.stderr
