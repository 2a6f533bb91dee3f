"""The page of a search: size against divergence, uniform artifacts beside it, and what each set of linears became."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap

from evaluators.html import document, section, table, tiles
from evaluators.svg import BLUE, INK, ORANGE, RED, STYLE, new_figure, to_svg

_HOW = {
    "frontier": (
        "Size against divergence",
        "Left and low is better. The line is predicted from one measurement of the model: the best choice for every "
        "number of bytes. Squares are predicted too: everything in one scheme. Dots were made and judged on text held "
        "out; the red one was kept.",
    ),
    "chosen": (
        "What was chosen",
        "A row is a decoder block, a column the linears in it that share an input. The darker, the more bits.",
    ),
    "cost": (
        "What 4 bits would cost",
        "KL divergence of the whole model if these linears alone had the fewest bits: where bits count.",
    ),
}
# From light to dark, fewest bits first.
_SHADES = ("#d9ecf7", "#a6d4ee", "#56b4e9", "#e69f00", "#d55e00", "#8c3b00")


def to_html(found: Mapping[str, Any], title: str) -> bytes:
    """The page of what `compress auto --json` prints, UTF-8. Same result, same bytes (for one matplotlib)."""
    draw = {"frontier": frontier_plot, "chosen": chosen_plot, "cost": cost_plot}
    body = [
        f"<h1>{escape(title)}</h1>",
        tiles(figures(found)),
        *(f"<p>{escape(note)}</p>" for note in found["notes"]),
        '<div class="grid">',
        *(section(name, *_HOW[name], plot(found)) for name, plot in draw.items()),
        "</div>",
        '<div class="grid">',
        table("Made and judged", ("MB", "KL predicted", "KL", "recovery", "at least", "passes"), _tried_rows(found)),
        table("One scheme for all", ("scheme", "MB", "KL predicted"), _uniform_rows(found)),
        "</div>",
    ]
    return document(title, body)


def figures(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What a person wants to know first: names, values, and a word beside each."""
    before, size = found["source_bytes"], found["out_bytes"] or 0
    out = [
        (
            "Size",
            f"{before / 1e6:.1f} → {size / 1e6:.1f} MB",
            f"{size / max(1, before):.0%} of the original",
        )
    ]
    kept = next((t for t in found["tried"] if t["bytes"] == size and t["recovery"] is not None), None)
    if kept is not None:
        out.append(("Quality kept", f"{kept['recovery']:.2%}", f"of perplexity, at least {kept['lower']:.2%}"))
        out.append(("KL divergence", f"{kept['kl']:.4f}", f"nats a token; predicted {kept['predicted_kl']:.4f}"))
        if found["gate"] is not None:
            word = "passed" if kept["passes"] else "missed"
            out.append(("Gate", word, f"of {found['gate']:.1%}, at its lower bound"))
    return out


def frontier_plot(found: Mapping[str, Any]) -> str | None:
    """Bytes against KL, predicted and judged."""
    if not found["frontier"]:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(3.8)
        draw_frontier(axes, found)
        return to_svg(figure, "frontier", "Bytes of weights against KL divergence, chosen and uniform")


def draw_frontier(axes: Axes, found: Mapping[str, Any]) -> None:
    """The best choices as a line, uniform artifacts as squares, what was judged as dots."""
    most = 1.05 * found["uniform"].get("w8", {"bytes": float("inf")})["bytes"]  # beyond, next to nothing is gained
    line = [p for p in found["frontier"] if p["predicted_kl"] > 0 and p["bytes"] <= most]
    axes.plot([p["bytes"] / 1e6 for p in line], [p["predicted_kl"] for p in line], color=BLUE, label="chosen")
    uniform = {name: p for name, p in found["uniform"].items() if p["predicted_kl"] > 0}
    axes.plot(
        [p["bytes"] / 1e6 for p in uniform.values()], [p["predicted_kl"] for p in uniform.values()], "s", color=ORANGE,
        label="one scheme",
    )  # fmt: skip
    for number, (name, point) in enumerate(sorted(uniform.items(), key=lambda pair: pair[1]["bytes"])):
        left = number % 2  # two in a row lie near each other, so their names lie on either side
        axes.annotate(
            name, (point["bytes"] / 1e6, point["predicted_kl"]), xytext=(-7, -4) if left else (7, 3),
            textcoords="offset points", ha="right" if left else "left", va="top" if left else "bottom",
        )  # fmt: skip
    for one in found["tried"]:
        if one["kl"]:
            kept = one["bytes"] == found["out_bytes"]
            axes.plot(one["bytes"] / 1e6, one["kl"], "o", color=RED if kept else INK, markersize=8 if kept else 5)
    axes.set_yscale("log")
    axes.margins(x=0.12)
    axes.set_xlabel("all weights, MB")
    axes.set_ylabel("KL, nats a token")
    axes.legend()


def chosen_plot(found: Mapping[str, Any]) -> str | None:
    """A cell for each set, coloured by its scheme."""
    rows, _ = _grid(found)
    if not rows:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(1.6 + 0.22 * len(rows))
        draw_chosen(axes, found)
        return to_svg(figure, "chosen", "The scheme chosen for each set of linears, by block")


def draw_chosen(axes: Axes, found: Mapping[str, Any]) -> None:
    """Blocks down, sets of linears across."""
    rows, names = _grid(found)
    every = _options(found)
    options = [o for o in every if any(o == one["chosen"] for row in rows.values() for one in row.values())]
    cells = [[options.index(row[n]["chosen"]) if n in row else -1 for n in names] for row in rows.values()]
    shades = [_SHADES[min(len(_SHADES) - 1, every.index(o))] for o in options]
    axes.imshow(cells, aspect="auto", cmap=ListedColormap(shades), vmin=-0.5, vmax=len(options) - 0.5)
    for y, row in enumerate(cells):
        for x, option in enumerate(row):
            if option >= 0 and len(rows) <= 40:
                axes.text(x, y, options[option], ha="center", va="center", fontsize=8, color="#000000")
    _label_grid(axes, rows, names)


def cost_plot(found: Mapping[str, Any]) -> str | None:
    """A cell for each set: what its smallest option would cost."""
    rows, names = _grid(found)
    if not rows:
        return None
    cells = [[max(row[n]["kl"].values()) if n in row else float("nan") for n in names] for row in rows.values()]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(1.6 + 0.22 * len(rows))
        image = axes.imshow(cells, aspect="auto", cmap="Blues")
        figure.colorbar(image, ax=axes, label="KL, nats a token")
        _label_grid(axes, rows, names)
        return to_svg(figure, "cost", "What the fewest bits would cost, by block and set of linears")


def _label_grid(axes: Any, rows: Mapping[str, Any], names: Sequence[str]) -> None:
    axes.set_xticks(range(len(names)), names)
    step = max(1, len(rows) // 20)
    axes.set_yticks(range(0, len(rows), step), list(rows)[::step])
    axes.set_ylabel("block")
    axes.grid(visible=False)


def _grid(found: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The sets by block and by the last parts of their layers' names; and those names in the order of the model."""
    rows: dict[str, dict[str, Any]] = {}
    names: list[str] = []
    for one in found["record"]["choice"]["sets"]:
        name = ", ".join(layer.rpartition(".")[2].removesuffix("_proj") for layer in one["layers"][:3])
        rows.setdefault(str(one["block"]), {})[name] = one
        if name not in names:
            names.append(name)
    return rows, names


def _options(found: Mapping[str, Any]) -> list[str]:
    """Every option, fewest bits first."""
    return list(dict.fromkeys(name for one in found["record"]["choice"]["sets"] for name in one["kl"]))


def _tried_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.2%}"

    return [
        (
            f"{one['bytes'] / 1e6:.2f}",
            f"{one['predicted_kl']:.4f}",
            "" if one["kl"] is None else f"{one['kl']:.4f}",
            percent(one["recovery"]),
            percent(one["lower"]),
            {True: "yes", False: "no", None: ""}[one["passes"] if found["gate"] is not None else None],
        )
        for one in found["tried"]
    ]


def _uniform_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (name, f"{p['bytes'] / 1e6:.2f}", f"{p['predicted_kl']:.4f}")
        for name, p in sorted(found["uniform"].items(), key=lambda pair: pair[1]["bytes"])
    ]
