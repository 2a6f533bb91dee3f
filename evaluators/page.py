"""One self-contained HTML page of an evaluation: plots and the numbers beside them. No script, no request, no fonts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from evaluators import plots
from evaluators.report import LABELS, headline, interval, number
from evaluators.results import Report

_CSS = """
:root{color-scheme:light dark;--ink:#1b1f24;--paper:#fff;--faint:#c9ced6;--soft:#5b6470;--card:#f6f7f9;
--pass:#0b6e4f;--fail:#b3261e;--inconclusive:#8a5a00}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ee;--paper:#14171c;--faint:#3c434d;--soft:#9aa4b1;--card:#1c2027;
--pass:#4cc79a;--fail:#ff8a80;--inconclusive:#f2b84b}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1320px;padding:24px 16px 64px;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:1.6rem;margin:0 0 .2em}h2{font-size:1.05rem;margin:0 0 .5em}
.PASS{color:var(--pass)}.FAIL{color:var(--fail)}.INCONCLUSIVE{color:var(--inconclusive)}
p{margin:.3em 0}.soft{color:var(--soft)}code{overflow-wrap:anywhere;font-size:.92em}
.grid{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,560px),1fr));margin:16px 0}
section{background:var(--card);border-radius:10px;padding:16px;min-width:0;break-inside:avoid}
svg{display:block;width:100%;height:auto;color:var(--ink)}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:4px 10px 4px 0;text-align:right;border-bottom:1px solid var(--faint);white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal;min-width:9em}
td.text{text-align:left;white-space:normal}th{font-weight:600;color:var(--soft)}
@media print{body{max-width:none}section{border:1px solid var(--faint)}}
"""

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
        f"<p><code>{escape(report.candidate.path)}</code> against <code>{escape(report.reference.path)}</code></p>",
        *([f"<p>Judged: {escape(report.judged)}</p>"] if report.judged else []),
        f'<p class="soft">{escape(_said(report))}</p>',
        *(f"<p>{escape(v.metric)}: {escape(v.reason)}</p>" for v in report.verdicts),
        '<div class="grid">',
        *sections,
        "</div>",
        '<div class="grid">',
        _table(
            "Measures",
            ("measure", "reference", "candidate", "95 % interval", "unit", "n"),
            [
                (
                    LABELS.get(m.name, m.name),
                    number(m.reference),
                    number(m.value),
                    interval(m),
                    m.unit,
                    f"{m.n} {m.counted}",
                )
                for m in report.metrics
            ],
        ),
        _table(
            "Blocks",
            ("block", "SNR, dB", "MSE"),
            [(b.name, "no error" if b.snr_db is None else f"{b.snr_db:.2f}", number(b.mse)) for b in report.blocks],
        ),
        "</div>",
        *(f'<p class="soft">Note: {escape(n)}</p>' for n in report.notes),
        f'<p class="soft">{escape(", ".join(f"{k} {v}" for k, v in report.versions.items()))}</p>',
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )
    return page.encode()


def _said(report: Report) -> str:
    t, c, r = report.text, report.candidate, report.reference
    return (
        f"{t['num_tokens']} tokens of {t['source']} in {t['num_windows']} windows (context {t['context']}, stride "
        f"{t['stride']}, from position {t['min_context']}, {'with' if t['bos'] else 'without'} BOS). Weights "
        f"{r.weight_bytes / 1e6:.1f} MB before, {c.weight_bytes / 1e6:.1f} MB after."
    )


def _section(name: str, svg: str | None) -> str:
    title, how = _HOW[name]
    if svg is None:
        return f'<section id="{name}"><h2>{title}</h2><p class="soft">Not available in this evaluation.</p></section>'
    return f'<section id="{name}"><h2>{title}</h2>{svg}<p class="soft">{escape(how)}</p></section>'


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return f'<section><h2>{title}</h2><p class="soft">Not available in this evaluation.</p></section>'
    cells = "".join(f"<th>{escape(h)}</th>" for h in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return (
        f'<section><h2>{title}</h2><div class="scroll"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div></section>"
    )
