"""The page of a pruning: what each block, head and tenth of the neurons would cost, and the shapes that were tried."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import matplotlib
from matplotlib.ticker import MaxNLocator

from compress.prune.kinds import held_text
from evaluators.html import document, section, table
from evaluators.svg import BLUE, ORANGE, RED, STYLE, new_figure, to_svg

_HOW = {
    "blocks": (
        "Blocks",
        "KL divergence to the original when this block alone is bypassed, nothing refitted. Red blocks went. One that "
        "costs little alone may cost more once its neighbours are gone, so all were measured again after each.",
    ),
    "heads": (
        "Heads",
        "What each head would cost alone, as a share of the attention's output that is lost after the others made up "
        "for it. A cross marks a head that went.",
    ),
    "neurons": (
        "Neurons",
        "What each tenth of a block's neurons would cost, cheapest tenth first, as a share of the MLP's output. A "
        "block whose first tenths cost nothing is wider than it need be.",
    ),
    "shapes": (
        "Shapes tried",
        "Left and low is better. Each dot is a shape that was pruned, refitted and judged on rows held out of "
        "each kind of text; the red one was made.",
    ),
}
_MISSING = "Not measured: nothing of this kind went."


def to_html(record: Mapping[str, Any], title: str) -> bytes:
    """The page of a manifest's `prune` record, UTF-8. Same record, same bytes (for one version of matplotlib)."""
    draw = {"blocks": blocks_plot, "heads": heads_plot, "neurons": neurons_plot, "shapes": shapes_plot}
    count, found = record["parameters"], record["divergence"]
    share = count["after"] / count["before"] - 1
    said = f"{count['before'] / 1e6:.1f} M -> {count['after'] / 1e6:.1f} M parameters ({share:+.1%})"
    if found["held_out"] is not None:
        said += f"; KL to the original on rows held out, nats a token: {held_text(found)}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(said)}.</p>",
        '<div class="grid">',
        *(section(name, *_HOW[name], plot(record), _MISSING) for name, plot in draw.items()),
        "</div>",
        '<div class="grid">',
        table("Blocks", ("block", "KL when bypassed", "stays"), _block_rows(record), _MISSING),
        table("Shapes tried", ("shape", "parameters, M", "KL, added up", "KL, judged"), _shape_rows(record), _MISSING),
        "</div>",
    ]
    return document(title, body)


def bypassed(record: Mapping[str, Any]) -> dict[int, float]:
    """KL of the model without each block alone; empty if depth was not measured."""
    depth = record["depth"]
    return {int(block): kl for block, kl in depth["removals"][0]["tried"]} if depth and depth["removals"] else {}


def blocks_plot(record: Mapping[str, Any]) -> str | None:
    """KL by bypassed block."""
    found = bypassed(record)
    if not found:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(3.2)
        gone = set(record["removed_blocks"])
        axes.bar(list(found), list(found.values()), color=[RED if b in gone else BLUE for b in found])
        axes.set_yscale("log")
        axes.set_xlabel("block")
        axes.set_ylabel("KL without it, nats a token")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return to_svg(figure, "blocks", "KL divergence when each block alone is bypassed")


def heads_plot(record: Mapping[str, Any]) -> str | None:
    """Cost of each head, by block."""
    found = [(b["block"], s) for b in record["blocks"] for s in b["sections"] if "cost" in s]
    if not found:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(3.2)
        for place, (_, part) in enumerate(found):
            for head, cost in enumerate(part["cost"]):
                stays = head in part["kept"]
                x = place + 0.7 * ((head + 0.5) / len(part["cost"]) - 0.5)
                axes.plot(x, max(cost, 1e-9), "o" if stays else "x", color=BLUE if stays else RED, markersize=4)
        axes.set_yscale("log")
        axes.set_xticks(range(len(found)), [str(block) for block, _ in found])
        axes.set_xlabel("block")
        axes.set_ylabel("share of output lost")
        return to_svg(figure, "heads", "Cost of each attention head alone, by block")


def neurons_plot(record: Mapping[str, Any]) -> str | None:
    """Cost of each tenth of the neurons, a line a block."""
    found = [s["cost_by_decile"] for b in record["blocks"] for s in b["sections"] if "cost_by_decile" in s]
    if not found:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(3.2)
        for i, costs in enumerate(found):
            shade = 0.25 + 0.75 * (i + 1) / len(found)
            axes.plot(
                range(1, len(costs) + 1), [max(c, 1e-9) for c in costs], "o-", color=ORANGE, alpha=shade, markersize=3
            )
        axes.set_yscale("log")
        axes.set_xlabel("tenth of the neurons, cheapest first; later blocks darker")
        axes.set_ylabel("share of output lost")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return to_svg(figure, "neurons", "Cost of each tenth of the neurons, by block")


def shapes_plot(record: Mapping[str, Any]) -> str | None:
    """Parameters against KL of every shape that was judged."""
    tried = record["search"]["tried"] if record["search"] else []
    if not tried:
        return None
    made = record["shape"]["after"]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(3.2)
        for one in tried:
            chosen = one["shape"] == made
            axes.plot(one["parameters"] / 1e6, one["divergence"], "D" if chosen else "o", color=RED if chosen else BLUE)
        axes.set_xlabel("parameters, million")
        axes.set_ylabel("KL, nats a token")
        return to_svg(figure, "shapes", "Parameters against divergence of every shape that was judged")


def _block_rows(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    kept = set(record["kept_blocks"])
    return [(str(b), f"{kl:.4f}", "yes" if b in kept else "no") for b, kl in sorted(bypassed(record).items())]


def _shape_rows(record: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    tried = sorted(record["search"]["tried"], key=lambda one: one["divergence"]) if record["search"] else []
    return [
        (
            ", ".join(f"{name} {value}" for name, value in one["shape"].items()),
            f"{one['parameters'] / 1e6:.1f}",
            f"{one['predicted']:.4f}",
            f"{one['divergence']:.4f}",
        )
        for one in tried
    ]
