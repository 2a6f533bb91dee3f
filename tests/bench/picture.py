"""The picture of the README, from what `compress auto --json` printed.

python tests/bench/picture.py FOUND.json OUT.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from compress.cli.auto_page import draw_chosen, draw_frontier, summary  # noqa: E402
from evaluators.svg import FAINT, INK, STYLE  # noqa: E402

# The page's stand-in colours, which a picture must name.
INKS = {INK: "#1b1f24", FAINT: "#d5dae1"}


def main() -> None:
    found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    style = {key: INKS.get(value, value) if isinstance(value, str) else value for key, value in STYLE.items()}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_frontier(left, found)
        draw_chosen(right, found)
        figure.suptitle(summary(found), fontsize=10)
        figure.savefig(sys.argv[2], dpi=90, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    main()
