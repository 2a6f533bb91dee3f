"""docs/cli.md and docs/json.md, from the commands' own help and the schemas: `python -m compress.cli.reference`.

A test compares the files with what is made here, so they are never older than the commands.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from compress.cli.main import main

WIDTH = 100
SCHEMAS = Path(__file__).resolve().parents[1] / "schemas"
_HEAD = """# The command line

Made from `--help` by `python -m compress.cli.reference`; do not edit. What `--json` prints: [json.md](json.md).

Options of every command, before or behind its name:

- `-q`, `--quiet`: no progress and no notes on stderr; errors are shown.
- `--log-json FILE`: the run's events are appended, a JSON object a line: time, command, event (say, start, step, note,
  error, end) and its facts.
- `--metrics FILE`: counters for Prometheus' textfile collector, written by one rename at the end:
  `compress_run_exit_code`, `_duration_seconds`, `_end_timestamp_seconds`, `_peak_memory_bytes`, `_steps`,
  `_steps_resumed`, `_notes`.

The shell completes names of commands and options after `eval "$(_COMPRESS_COMPLETE=bash_source compress)"` in
`~/.bashrc`, the same with `zsh_source` in `~/.zshrc`, or `_COMPRESS_COMPLETE=fish_source compress | source` in fish.
"""
_JSON_HEAD = """# What `--json` prints

One JSON object on stdout, and nothing else there. The schemas (JSON Schema 2020-12) lie in `compress/schemas/`; the
tests validate real outputs. Made by `python -m compress.cli.reference`; do not edit.
"""


def cli_page() -> str:
    """docs/cli.md."""
    parts = [_HEAD, _section(main, "compress")]
    with click.Context(main) as context:
        for name in main.list_commands(context):
            command = main.get_command(context, name)
            assert command is not None
            parts.append(_section(command, f"compress {name}"))
    return "\n".join(parts)


def _section(command: click.Command, name: str) -> str:
    context = click.Context(command, info_name=name, max_content_width=WIDTH, terminal_width=WIDTH, color=False)
    context.help_option_names = ["-h", "--help"]
    return f"## {name}\n\n```\n{command.get_help(context).rstrip()}\n```\n"


def json_page() -> str:
    """docs/json.md."""
    parts = [_JSON_HEAD]
    for path in sorted(SCHEMAS.glob("*.json")):
        schema = json.loads(path.read_text(encoding="utf-8"))
        parts.append(f"## {path.stem}\n\n{schema['title']}\n")
        for shape in schema.get("oneOf", [schema]):
            parts.append("\n".join(["| field | type | what it is |", "|---|---|---|", *_rows(shape, "")]) + "\n")
    return "\n".join(parts)


def _rows(shape: Mapping[str, Any], before: str) -> Iterator[str]:
    inner = shape.get("additionalProperties")
    fields = shape.get("properties") or ({"NAME": inner} if isinstance(inner, dict) else {})
    for name, field in fields.items():
        kind = field.get("type", "one of " + ", ".join(json.dumps(v) for v in field.get("enum", [field.get("const")])))
        kind = " or ".join(kind) if isinstance(kind, list) else kind
        yield f"| `{before}{name}` | {kind} | {field.get('description', '')} |"
        if not before.count("."):
            yield from _rows(field, f"{before}{name}.")
            yield from _rows(field.get("items", {}), f"{before}{name}[].")


if __name__ == "__main__":
    docs = Path(__file__).resolve().parents[2] / "docs"
    (docs / "cli.md").write_text(cli_page(), encoding="utf-8")
    (docs / "json.md").write_text(json_page(), encoding="utf-8")
