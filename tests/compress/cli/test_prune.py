"""`compress prune` from the command line: what would go, the page, and where its result goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from compress.cli.main import main


def compress(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def found(*args: object) -> dict[str, Any]:
    done = compress(*args, "--json")
    assert done.exit_code == 0, done.stderr
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


TEXT = "".join(f"Row {i} tells of ship number {7 * i}, and of what became of it. " for i in range(400))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_what_amounts_would_leave(build_model: Any) -> None:
    said = found("prune", build_model(), "--depth", 1, "--intermediate", 0.5, "--dry-run", "--target", "orin")
    assert said["after"]["parameters"] < said["before"]["parameters"]
    assert said["after"]["blocks"] == said["before"]["blocks"] - 1
    assert said["target"]["fits"]


def test_what_a_goal_could_take(build_model: Any) -> None:
    """The shapes that meet it, largest first; each smaller than asked, and none that transformers would not build."""
    folder = build_model(num_hidden_layers=4, num_key_value_heads=4)
    whole = found("prune", folder, "--depth", 1, "--dry-run")["before"]["parameters"]
    goal = round(0.93 * whole)
    said = found("prune", folder, "--params", goal, "--dry-run", "--candidates", 5)
    sizes = [one["parameters"] for one in said["largest"]]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] <= goal and len(sizes) == min(5, said["meet_it"])
    assert all(one["hidden"] % one["heads"] == 0 for one in said["largest"])
    shown = compress("prune", folder, "--params", goal, "--dry-run", "--target", "orin")
    assert shown.exit_code == 0 and f"{said['meet_it']} shapes" in shown.stdout and " MB" in shown.stdout


def test_a_shape_that_transformers_does_not_build(build_model: Any) -> None:
    done = compress("prune", build_model(num_key_value_heads=4), "--heads", 1, "--dry-run")
    assert done.exit_code == 1
    assert (
        "transformers builds no llama of b2-i128-h3x3-d64" in done.stderr and "another number of heads" in done.stderr
    )


@pytest.mark.parametrize(
    ("page", "says"),
    [("page.txt", "name the page to write"), ("nowhere/page.html", "no folder that can be written")],
)
def test_a_page_that_cannot_be_written_is_refused_first(build_model: Any, tmp_path: Path, page: str, says: str) -> None:
    done = compress("prune", build_model(), "--depth", 1, "--report", tmp_path / page, "-o", tmp_path / "out")
    assert done.exit_code == 1 and says in done.stderr and not (tmp_path / "out").exists()


def test_its_result_goes_on(build_model: Any, text: Path, tmp_path: Path) -> None:
    """Pruned in depth and width, with its page; then judged against the original, quantized both ways, and exported."""
    small = ("--calib", text, "--samples", 8, "--seq-len", 32, "--self-samples", 4, "--device", "cpu")
    page, pruned = tmp_path / "page.html", tmp_path / "pruned"
    amounts = ("--depth", 1, "--intermediate", 0.5, "--heads", 2)
    made = found("prune", build_model(num_hidden_layers=3), *amounts, *small, "-o", pruned, "--report", page)
    html = page.read_text()
    assert html.count("<svg") == 3 and "Not measured" in html  # no shapes were tried
    assert f"{made['record']['parameters']['after'] / 1e6:.1f} M parameters" in html
    quantized = found("awq", pruned, "--group-size", 32, "--effort", "fast", *small, "-o", tmp_path / "w4")
    assert len(quantized["record"]["parent"]["sha256"]) == 64
    found("int8", pruned, *small, "-o", tmp_path / "w8")
    found("export", tmp_path / "w4", "--target", "a100", "--format", "hf", "-o", tmp_path / "hf")
    other = tmp_path / "other.txt"
    other.write_text(TEXT.replace("ship", "train").replace("Row", "Line").replace("became", "was left"))
    for name in ("pruned", "w4", "w8"):
        judged = found("evaluate", tmp_path / name, "--data", other, "--context", 32, "--max-tokens", 256, "--no-cache")
        assert judged["reference"]["path"].endswith("model") and judged["candidate"]["path"].endswith(name)
