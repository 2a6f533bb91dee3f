"""lm-evaluation-harness over our runner. Without the harness: one sentence that says how to get it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress import tokens
from compress.errors import ConfigError
from compress.runtime.streamed import TorchRunner
from evaluators import harness
from evaluators.tasks import load_task, requests, score

YAML = """task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {test: FILE}
test_split: test
output_type: multiple_choice
doc_to_text: "{{query}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - metric: acc
"""


def test_missing_harness_says_how_to_get_it(reference_model: Path) -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("lm_eval is installed here")
    tokenizer = tokens.load_tokenizer(reference_model)
    with pytest.raises(ConfigError, match=r"compress-toolkit\[eval\]"):
        harness.run(TorchRunner.open(reference_model), tokenizer, ["piqa"], front=None, limit=1, max_length=512)


def test_a_local_task_answers_as_our_own_does(reference_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [
        {"query": f"Question: what is {w}", "choices": ["a river", "a town in France", "his"], "gold": i % 3}
        for i, w in enumerate("London water music Paris war king".split())
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    (tmp_path / "tiny.yaml").write_text(YAML.replace("FILE", str(file)), encoding="utf-8")
    runner, tokenizer = TorchRunner.open(reference_model), tokens.load_tokenizer(reference_model)
    options: dict[str, Any] = {"front": None, "limit": None, "max_length": 512, "include_path": str(tmp_path)}
    (found,) = harness.run(runner, tokenizer, ["tiny_choice"], **options)
    task = load_task(str(file))
    asked = requests(task, tokenizer, front=None, max_length=512)
    ours = score(task, asked, runner.read([r.tokens for r in asked]), 0)
    np.testing.assert_array_equal(found.correct_N, ours.correct_N)
    assert found.chance == pytest.approx(1 / 3) and found.documents == list(range(6))
    with pytest.raises(ConfigError, match="lm_eval has no task nonsense"):
        harness.run(runner, tokenizer, ["nonsense"], **options)
