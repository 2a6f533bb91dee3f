"""The longest row that a model was built to read."""

import json
from pathlib import Path
from typing import Any

import pytest

from compress.errors import ConfigError
from compress.positions import max_positions, refuse_longer


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 128}, ("max_position_embeddings", 128)),
        ({"n_positions": 1024}, ("n_positions", 1024)),
        (
            {"text_config": {"max_position_embeddings": 64}, "max_position_embeddings": 9},
            ("max_position_embeddings", 64),
        ),
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            ("max_position_embeddings", 131072),
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
            },
            ("max_position_embeddings", 131072),
        ),
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": True}, None),
        ({"alibi": True}, None),
    ],
)
def test_limits(config: dict[str, Any], expected: tuple[str, int] | None) -> None:
    assert max_positions(config) == expected


def test_longer_rows_are_refused_by_name(tmp_path: Path) -> None:
    refuse_longer(tmp_path, 10**9, "--context")  # no config: whoever opens the model says so
    (tmp_path / "config.json").write_text(json.dumps({"n_positions": 1024}), encoding="utf-8")
    refuse_longer(tmp_path, 1024, "--context")
    with pytest.raises(ConfigError, match=r"--context 1025 .*\(n_positions 1024 .*pass --context 1024 or less"):
        refuse_longer(tmp_path, 1025, "--context")
