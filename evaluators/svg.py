"""One drawing as SVG text that takes its colours from the page around it, light or dark.

It is drawn in two stand-in colours that become `currentColor` and a CSS variable. Same drawing, same bytes: no dates,
fixed salt for ids.
"""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT = "#010203", "#040506"
# Blue, orange and vermilion, which colour-blind readers can tell apart (Okabe and Ito).
BLUE, ORANGE, RED = "#56b4e9", "#e69f00", "#d55e00"
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def new_figure(height: float) -> tuple[Figure, Axes]:
    """An empty drawing as wide as a column of the page."""
    figure = Figure(figsize=(6.2, height), layout="constrained")
    return figure, figure.add_subplot()


def to_svg(figure: Figure, name: str, label: str) -> str:
    """The drawing; `name` is its own on a page, `label` is what a screen reader says."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(FAINT, "var(--faint)")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)  # several drawings share one page
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    for size in ("width", "height"):  # the page decides
        text = re.sub(rf'(<svg[^>]*?) {size}="[^"]+"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
