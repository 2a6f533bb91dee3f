"""The pages made from the commands, what every command must have, completion, and outputs against their schemas."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from compress.cli.help import EXAMPLES
from compress.cli.main import main
from compress.cli.reference import SCHEMAS, cli_page, json_page

ROOT = Path(__file__).resolve().parents[3]
NAMES = main.list_commands(click.Context(main))


@pytest.mark.parametrize(("page", "made"), [("cli.md", cli_page), ("json.md", json_page)])
def test_pages_are_what_the_commands_say(page: str, made: Any) -> None:
    found = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert found == made(), f"docs/{page} is older than the commands; run: python -m compress.cli.reference"


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_an_example_that_parses_and_every_option_a_word(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    words = shlex.split(EXAMPLES[name])
    assert words[:2] == ["compress", name]
    command.make_context(name, words[2:])
    silent = [o.name for o in command.params if isinstance(o, click.Option) and not o.help]
    assert not silent, f"options without help: {silent}"
    assert (SCHEMAS / f"{name}.json").exists() == any(o.name == "as_json" for o in command.params)


def test_no_option_is_lost_by_grouping() -> None:
    for name in NAMES:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        shown = CliRunner().invoke(main, [name, "--help"]).stdout
        for option in command.params:
            assert isinstance(option, click.Argument) or option.opts[0] in shown, (name, option.opts)
        assert shown.endswith(f"\nExample:\n  {EXAMPLES[name]}\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [("compress aw", "awq"), ("compress evaluate --ga", "--gate"), ("compress awq --effort b", "balanced")],
)
def test_the_shell_completes(words: str, expected: str) -> None:
    """As bash asks, through click's own completion."""
    environment = {
        **os.environ, "_COMPRESS_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")),
    }  # fmt: skip
    code = "from compress.cli.main import main; main(prog_name='compress')"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert f"plain,{expected}" in found.stdout.splitlines(), found


def test_version_is_the_packages() -> None:
    from compress import __version__

    assert CliRunner().invoke(main, ["--version"]).stdout == f"compress, version {__version__}\n"


@pytest.mark.parametrize(
    "args", [("targets",), ("doctor",), ("fit", "--target", "orin"), ("inspect",), ("status",), ("gc",)], ids=" ".join
)
def test_what_is_printed_is_as_its_schema_says(
    args: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, valid_json: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, [*args, "--json"])
    assert done.exit_code in (0, 1)
    assert valid_json(args[0], done.stdout)


def test_a_schema_refuses_what_is_not_documented(valid_json: Any) -> None:
    import jsonschema

    good = {"workspace": "artifacts", "could_go": [], "notes": []}
    valid_json("gc", json.dumps(good))
    for wrong in ({**good, "more": 1}, {"workspace": "artifacts"}, {**good, "could_go": [{}]}):
        with pytest.raises(jsonschema.ValidationError):
            valid_json("gc", json.dumps(wrong))


# ---- what machines hear --------------------------------------------------------------------------------


def test_events_and_counters_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["awq", "--samples", "2", "--seq-len", "64", "--effort", "fast", "--quiet", "--log-json", "run.jsonl"]
    done = CliRunner().invoke(main, [*args, "--metrics=run.prom"], catch_exceptions=False)
    assert done.exit_code == 0 and done.stderr == "" and "wrote artifacts/" in done.stdout
    events = [json.loads(line) for line in Path("run.jsonl").read_text().splitlines()]
    assert {e["command"] for e in events} == {"awq"} and events[-1]["event"] == "end" and events[-1]["exit_code"] == 0
    assert [e["done"] for e in events if e["event"] == "step" and e["done"] is not None] == [1, 2, 3, 4, 5, 6]
    metrics = Path("run.prom").read_text()
    assert 'compress_run_steps{command="awq",what="block"} 6\n' in metrics
    assert 'compress_run_exit_code{command="awq"} 0\n' in metrics
    line = re.compile(
        r"(# (HELP|TYPE) compress_run_\w+ .+|compress_run_\w+\{\w+=\"[^\"]*\"(,\w+=\"[^\"]*\")*\} [0-9.e+]+)"
    )
    assert all(line.fullmatch(x) for x in metrics.splitlines())
    failed = CliRunner().invoke(main, ["--metrics", "run.prom", "--log-json", "run.jsonl", "-q", *args[:5]])
    assert failed.exit_code == 1 and "exists already" in failed.stderr, "errors are shown all the same"
    assert 'compress_run_exit_code{command="awq"} 1\n' in Path("run.prom").read_text()
    later = [json.loads(x) for x in Path("run.jsonl").read_text().splitlines()[len(events) :]]
    assert [e["event"] for e in later][-2:] == ["error", "end"] and "exists already" in later[-2]["text"]


def test_no_file_of_a_stranger_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("thesis")
    for flag in ("--log-json", "--metrics"):
        refused = CliRunner().invoke(main, ["targets", flag, "mine.txt"])
        assert refused.exit_code == 1 and "mine.txt holds something else" in refused.stderr
    assert Path("mine.txt").read_text() == "thesis"
    assert "cannot be written" in CliRunner().invoke(main, ["targets", "--metrics", "no/where.prom"]).stderr
