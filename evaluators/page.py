"""One self-contained HTML page of an evaluation: plots and the numbers beside them. No script, no request, no fonts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from evaluators import plots
from evaluators.html import document, section, table, tiles
from evaluators.report import headline, interval, named, number, unit
from evaluators.results import Report

_MISSING = "Not available in this evaluation."
_HOW = {
    "recovery": (
        "Recovery against the gate",
        "A dot is the share of the reference that is left, its bar runs between the one-sided bounds. The gate passes "
        "a bar that lies wholly right of the dashed line, fails one wholly left of it, and leaves others undecided.",
    ),
    "depth": (
        "Where the error enters",
        "Hidden states after each block against the reference's, on the same tokens. A steep fall of the ratio (in "
        "dB) points at the block to spare, with --skip or a smaller group size.",
    ),
    "divergence": (
        "How far the predictions moved",
        "One count a token: how far the candidate's next-token distribution lies from the reference's. A long right "
        "tail means few tokens that changed much.",
    ),
    "entropy": (
        "Attention heads",
        "How widely each head spreads its attention. A bar far from its dot is a head that collapsed or spread out.",
    ),
    "activations": (
        "MLP activations",
        "Magnitudes entering each block's last linear: box of the quartiles, line from 5 to 95 %, triangle at 99.9 %, "
        "cross at the maximum. Scales folded into the weights shift a block's values as a whole; that is meant.",
    ),
    "frontier": (
        "Size against quality",
        "Left and low is better. Other candidates appear once they were judged on the same text.",
    ),
}


def to_html(report: Report, others: Sequence[dict[str, Any]] = ()) -> bytes:
    """The page, UTF-8. Same report, same bytes (for one version of matplotlib)."""
    drawn: dict[str, Callable[[], str | None]] = {
        "recovery": lambda: plots.recovery(report),
        "depth": lambda: plots.depth(report),
        "divergence": lambda: plots.divergence(report),
        "entropy": lambda: plots.entropy(report),
        "activations": lambda: plots.activations(report),
        "frontier": lambda: plots.frontier(report, others),
    }
    sections = [_section(name, draw()) for name, draw in drawn.items()]
    title = headline(report)
    outcome = report.outcome or ""
    body = [
        f'<h1><span class="{outcome}">{escape(title)}</span></h1>',
        tiles(summary(report)),
        f"<p><code>{escape(report.candidate.path)}</code> against <code>{escape(report.reference.path)}</code></p>",
        *([f"<p>Judged: {escape(report.judged)}</p>"] if report.judged else []),
        f'<p class="soft">{escape(_said(report))}</p>',
        *(f"<p>{escape(v.metric)}: {escape(v.reason)}</p>" for v in report.verdicts),
        '<div class="grid">',
        *sections,
        "</div>",
        '<div class="grid">',
        table(
            "Measures",
            ("measure", "reference", "candidate", "95 % interval", "unit", "n"),
            [
                (
                    named(m),
                    number(m.reference),
                    number(m.value),
                    interval(m),
                    unit(m),
                    f"{m.n} {m.counted}",
                )
                for m in report.metrics
            ],
        ),
        table(
            "Blocks",
            ("block", "SNR, dB", "MSE"),
            [(b.name, "no error" if b.snr_db is None else f"{b.snr_db:.2f}", number(b.mse)) for b in report.blocks],
        ),
        "</div>",
        *(f'<p class="soft">Note: {escape(n)}</p>' for n in report.notes),
        f'<p class="soft">{escape(", ".join(f"{k} {v}" for k, v in report.versions.items()))}</p>',
    ]
    return document(title, body)


def summary(report: Report) -> list[tuple[str, str, str]]:
    """What a manager asks first: size, what is kept, speed; each with its name, its value and a word beside it."""
    before, after = report.reference, report.candidate
    found = {metric.name: metric for metric in report.metrics}
    bits = f", {after.bits_per_weight:.2f} bits a weight" if after.num_parameters else ""
    share = after.weight_bytes / max(1, before.weight_bytes)
    out = [
        (
            "Size",
            f"{before.weight_bytes / 1e6:.1f} → {after.weight_bytes / 1e6:.1f} MB",
            f"{share:.0%} of the original{bits}",
        )
    ]
    if "perplexity_recovery" in found:
        kept = found["perplexity_recovery"]
        bound = "" if kept.lower is None else f", at least {kept.lower:.2%}"
        out.append(("Quality kept", f"{kept.value:.2%}", f"of perplexity{bound}"))
    if "top1_agreement" in found:
        out.append(("Same next token", f"{found['top1_agreement'].value:.1%}", "as the original's first choice"))
    out.append(("Speed", "not measured here", "compress bench measures both, on the machine it runs on"))
    return out


def _said(report: Report) -> str:
    t, c, r = report.text, report.candidate, report.reference
    return (
        f"{t['num_tokens']} tokens of {t['source']} in {t['num_windows']} windows (context {t['context']}, stride "
        f"{t['stride']}, from position {t['min_context']}, {'with' if t['bos'] else 'without'} BOS). Weights "
        f"{r.weight_bytes / 1e6:.1f} MB before, {c.weight_bytes / 1e6:.1f} MB after."
    )


def _section(name: str, svg: str | None) -> str:
    return section(name, *_HOW[name], svg, _MISSING)
