"""The plots of a report, as SVG text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from evaluators.results import Report
from evaluators.svg import BLUE, FAINT, INK, ORANGE, RED, STYLE, new_figure, to_svg

REFERENCE, CANDIDATE, GATE = BLUE, ORANGE, RED


def recovery(report: Report) -> str | None:
    """Each gated metric's recovery with its bounds against the gate."""
    shown = [v for v in reversed(report.verdicts) if math.isfinite(v.recovery.value)]
    if not shown:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(1.2 + 0.5 * len(shown))
        for y, v in enumerate(shown):
            r = v.recovery
            axes.plot([100 * r.lower, 100 * r.upper], [y, y], color=CANDIDATE, linewidth=3, solid_capstyle="butt")
            axes.plot(100 * r.value, y, "o", color=CANDIDATE, markersize=8)
        axes.axvline(100 * shown[0].threshold, color=GATE, linestyle="--", label="gate")
        axes.axvline(100, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(shown)), [v.metric for v in shown])
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.set_xlabel("recovery of the reference, %")
        axes.grid(axis="y", visible=False)
        return to_svg(figure, "recovery", "Recovery of each gated metric with its bounds against the gate")


def depth(report: Report) -> str | None:
    """Signal-to-noise ratio and mean squared error of the hidden states by block."""
    shown = [b for b in report.blocks if b.snr_db is not None]
    if not shown:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(3.2)
        decibels = [b.snr_db for b in shown if b.snr_db is not None]
        axes.plot([b.index for b in shown], decibels, "o-", color=CANDIDATE)
        axes.set_xlabel("block")
        axes.set_ylabel("SNR, dB (o)")
        right = axes.twinx()
        right.plot([b.index for b in shown], [b.mse for b in shown], "s--", color=REFERENCE, markersize=4)
        right.set_yscale("log")
        right.set_ylabel("MSE (squares)")
        right.grid(visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return to_svg(figure, "depth", "Signal-to-noise ratio and mean squared error of hidden states by block")


def divergence(report: Report) -> str | None:
    """How the KL divergence is distributed over tokens."""
    histogram = report.kl_histogram
    if histogram is None:
        return None
    value = {m.name: m.value for m in report.metrics}
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(3.2)
        axes.stairs(histogram.counts, histogram.edges, fill=True, color=REFERENCE)
        marks = (("median", "kl_median", ":"), ("mean", "kl_mean", "-"), ("99 %", "kl_99", "--"))
        for label, name, style in marks:
            if value.get(name, 0) > 0:
                axes.axvline(value[name], color=CANDIDATE, linestyle=style, label=f"{label} {value[name]:.3g}")
        axes.set_xscale("log")
        axes.set_xlabel("KL divergence from the reference, nats per token")
        axes.set_ylabel("tokens")
        axes.legend(loc="upper left")
        return to_svg(figure, "divergence", "Histogram of the KL divergence over tokens")


def entropy(report: Report) -> str | None:
    """Attention entropy of each head, reference beside candidate."""
    shown = [b for b in report.internals if b.entropy_reference and b.entropy_candidate]
    if not shown:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(3.2)
        for b in shown:
            heads = len(b.entropy_reference)
            xs = [b.index + 0.7 * ((h + 0.5) / heads - 0.5) for h in range(heads)]
            for x, before, after in zip(xs, b.entropy_reference, b.entropy_candidate, strict=True):
                axes.plot([x, x], [before, after], color=FAINT, linewidth=1)
            size = 5 if len(shown) * heads < 300 else 2
            axes.plot(xs, b.entropy_reference, "o", color=REFERENCE, markersize=size)
            axes.plot(xs, b.entropy_candidate, "_", color=CANDIDATE, markersize=size + 3, markeredgewidth=2)
        axes.plot([], [], "o", color=REFERENCE, label="reference")
        axes.plot([], [], "_", color=CANDIDATE, markersize=8, markeredgewidth=2, label="candidate")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("block; within it, one mark a head")
        axes.set_ylabel("attention entropy, nats")
        _legend_above(axes)
        return to_svg(figure, "entropy", "Attention entropy of each head in reference and candidate, by block")


def activations(report: Report) -> str | None:
    """Quantiles of the magnitudes entering each block's last linear."""
    shown = [b for b in report.internals if b.activations_reference and b.activations_candidate]
    if not shown:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(3.2)
        for offset, color, label, values in (
            (-0.15, REFERENCE, "reference", [b.activations_reference for b in shown]),
            (0.15, CANDIDATE, "candidate", [b.activations_candidate for b in shown]),
        ):
            for b, q in zip(shown, values, strict=True):
                x = b.index + offset
                axes.plot([x, x], [q[1], q[5]], color=color, linewidth=2)  # 5 to 95 %
                axes.plot([x, x], [q[2], q[4]], color=color, linewidth=6, solid_capstyle="butt")  # quartiles
                axes.plot(x, q[7], "^", color=color, markersize=4)  # 99.9 %
                axes.plot(x, q[8], "x", color=color, markersize=5)  # maximum
            axes.plot([], [], color=color, linewidth=6, label=label)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("block")
        axes.set_ylabel("|activation|")
        _legend_above(axes)
        return to_svg(figure, "activations", "Quantiles of MLP activations in reference and candidate, by block")


def frontier(report: Report, others: Sequence[dict[str, Any]]) -> str | None:
    """Size against perplexity: the reference, this candidate, and earlier ones judged on the same text."""
    ppl = next((m for m in report.metrics if m.name == "perplexity"), None)
    if ppl is None or ppl.reference is None or not report.candidate.num_parameters:
        return None
    points = [
        (report.reference.bits_per_weight, ppl.reference, "reference", REFERENCE, "o"),
        (report.candidate.bits_per_weight, ppl.value, "this candidate", CANDIDATE, "D"),
        *((o["bits_per_weight"], o["metrics"]["perplexity"], o["path"], INK, ".") for o in others),
    ]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(3.2)
        for x, y, label, color, marker in points:
            axes.plot(x, y, marker, color=color, markersize=9)
            axes.annotate(label, (x, y), textcoords="offset points", xytext=(7, 6))
        axes.margins(0.25)
        axes.set_xlabel("bits a weight, all tensors of the file")
        axes.set_ylabel("perplexity")
        return to_svg(figure, "frontier", "Bits a weight against perplexity")


def _legend_above(axes: Axes) -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)
