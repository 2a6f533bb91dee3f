"""Bytes that an export moves, as a multiple of the artifact's: what it reads and writes through the system, and what it
reads through memory maps. One process, one export; counts, not times, so that any machine will do.

    python tests/bench/export_bytes.py ARTIFACT OUT [--target a100] [--format hf]

Read and written: `rchar` and `wchar` of /proc/self/io (Linux), which count what comes from the page cache as well.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.model import StreamedModel
from compress.workspace import resolve
from exporters.export import ExportRequest, export, target_named


def counted() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    found = {key: int(value) for key, value in (line.split(": ") for line in lines)}
    return {"read": found["rchar"], "written": found["wchar"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact")
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", default="a100")
    parser.add_argument("--format", default="hf")
    arguments = parser.parse_args()
    mapped = 0
    opened = 0
    plain_read, plain_open = Checkpoint.read, Checkpoint.open.__func__  # type: ignore[attr-defined]

    def read(self: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
        nonlocal mapped
        found = plain_read(self, names)
        mapped += sum(value.numel() * value.element_size() for value in found.values())
        return found

    def open_counted(cls: type[Checkpoint], path: Path | str) -> Checkpoint:
        nonlocal opened
        opened += 1
        return plain_open(cls, path)  # type: ignore[no-any-return]

    Checkpoint.read = read  # type: ignore[method-assign]
    Checkpoint.open = classmethod(open_counted)  # type: ignore[method-assign,assignment]
    source = resolve(arguments.artifact)
    request = ExportRequest(
        source=source, target=target_named(arguments.target), format=arguments.format, out=arguments.out, force=True
    )
    StreamedModel.open(source.path)  # so that importing transformers is not among what is counted
    before = counted()
    export(request)
    after = counted()
    weights = sum(path.stat().st_size for path in source.path.glob("*.safetensors"))
    moved = {**{key: after[key] - before[key] for key in before}, "through maps": mapped}
    print(
        json.dumps(
            {
                "artifact_bytes": weights,
                "moved_bytes": moved,
                "times_the_artifact": round(sum(moved.values()) / weights, 2),
                "checkpoints_opened": opened,
            }
        )
    )


if __name__ == "__main__":
    main()
