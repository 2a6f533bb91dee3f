"""What is compared: rivals' methods, and ours at every effort that `compress awq` offers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Method(NamedTuple):
    """name: as in the table. site: the environment it needs, None for ours. script: in quantizers/, "" for ours.

    awq_format: whether AutoAWQ's format can hold the result. about_seconds: on one thread or,
    where that takes longer, on a GPU, to begin with the longest.
    """

    name: str
    site: str | None
    script: str
    args: tuple[str, ...]
    about_seconds: float
    awq_format: bool = True


RIVALS = (
    Method("llmcompressor-rtn", "llmcompressor", "run_llmcompressor.py", ("--method", "rtn"), 1),
    Method("llmcompressor-awq", "llmcompressor", "run_llmcompressor.py", ("--method", "awq"), 107),
    Method("llmcompressor-gptq", "llmcompressor", "run_llmcompressor.py", ("--method", "gptq"), 238),  # of a GPU
    Method("llmcompressor-awq+gptq", "llmcompressor", "run_llmcompressor.py", ("--method", "awq+gptq"), 345),
    Method("autoawq", "autoawq", "run_autoawq.py", ("--clip", "1"), 188),
    Method("gptqmodel-awq", "gptqmodel", "run_gptqmodel.py", ("--method", "awq"), 160),
    Method(
        "gptqmodel-gptq", "gptqmodel", "run_gptqmodel.py", ("--method", "gptq", "--mse", "2", "--act-order", "1"), 22,
        awq_format=False,
    ),
    Method("autoround-sign", "autoround", "run_autoround.py", ("--method", "sign", "--iters", "200"), 624),
    Method("autoround-awq+sign", "autoround", "run_autoround.py", ("--method", "awq+sign", "--iters", "200"), 698),
)  # fmt: skip


SECONDS = {"best": 450.0, "balanced": 25.0, "fast": 15.0}  # of ours, by effort


def ours(more: Sequence[str], help_text: str) -> list[Method]:
    """Each effort named in the help of `compress awq`, and what `NAME=OPTIONS` strings add."""
    offered = re.search(r"--effort\s+\[([a-z|\s]+)\]", help_text)
    efforts = "".join(offered[1].split()).split("|") if offered else []
    pairs = [("ours-" + effort, f"--effort {effort}") for effort in efforts]
    pairs += [(name, options) for name, _, options in (text.partition("=") for text in more)]
    arguments = [(name, tuple(shlex.split(options))) for name, options in pairs]
    return [Method(name, None, "", args, SECONDS[effort_of(args)]) for name, args in arguments]


def effort_of(args: Sequence[str]) -> str:
    """The effort that arguments of `compress awq` ask for; the last one counts."""
    asked = [after for before, after in zip(args, args[1:], strict=False) if before == "--effort"]
    return asked[-1] if asked else "balanced"


class Interpreters(NamedTuple):
    """Where rivals live: `envs`/SITE/bin/python, or folders `sites`/SITE and `sites`/common for one `python`."""

    envs: Path | None
    sites: Path | None
    python: Path

    def of(self, site: str) -> tuple[Path, list[Path]]:
        """The interpreter for `site`, and the folders on its PYTHONPATH."""
        if self.envs is not None:
            return self.envs / site / "bin" / "python", []
        assert self.sites is not None
        return self.python, [self.sites / site, self.sites / "common"]

    def absent(self, methods: Sequence[Method]) -> Mapping[str, Path]:
        """Methods that cannot run, with the path that is not there."""
        out: dict[str, Path] = {}
        for method in methods:
            if method.site is not None:
                python, folders = self.of(method.site)
                missing = [path for path in (python, *folders[:1]) if not path.exists()]
                out |= {method.name: missing[0]} if missing else {}
        return out
