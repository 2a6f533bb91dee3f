"""`compress generate` as a user types it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from compress.cli.main import main


def test_text_goes_to_stdout_and_figures_to_stderr(reference_model: Path, valid_json: Any) -> None:
    args = ["generate", str(reference_model), "The ship sailed", "--max-new-tokens", "12"]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 0 and len(done.stdout.split()) > 3
    assert "torch" in done.stderr and "4 + 12 tokens" in done.stderr and "tokens/s" in done.stderr
    found = valid_json("generate", CliRunner().invoke(main, [*args, "--json"]).stdout)
    assert found["text"].strip() == done.stdout.strip() and found["new_tokens"] == 12 and found["graph_replays"] == 0
    piped = CliRunner().invoke(main, [*args[:2], "-", *args[3:]], input="The ship sailed")
    assert piped.stdout == done.stdout


def test_a_chat_template_is_used_where_there_is_one(reference_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    shutil.copytree(reference_model, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}In {{ m['content'] }} the ship{% endfor %}")
    args = ["generate", str(folder), "1850", "--max-new-tokens", "4", "--json"]
    with_template, without, plain = (
        json.loads(CliRunner().invoke(main, a).stdout)["prompt_tokens"]
        for a in (args, [*args, "--no-chat"], ["generate", str(reference_model), "1850", *args[3:]])
    )
    assert with_template > without == plain
    refused = CliRunner().invoke(main, ["generate", str(reference_model), "x", "--chat"])
    assert refused.exit_code == 1 and "has no chat template" in refused.stderr


def test_a_gpu_that_is_not_there_is_named(reference_model: Path) -> None:
    import torch

    if torch.cuda.is_available():
        return
    refused = CliRunner().invoke(main, ["generate", str(reference_model), "x", "--runtime", "gpu"])
    assert refused.exit_code == 1 and "compress doctor" in refused.stderr
