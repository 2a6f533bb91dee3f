"""Reports of one evaluation for each reader: JSON, JUnit (CI), Markdown (a job's summary), text (a terminal)."""

from __future__ import annotations

import json
import math
from typing import Any
from xml.etree import ElementTree

from evaluators.results import Metric, Report, Verdict

# What a person looks at first, and what it is called in the tables.
LABELS = {
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "kl_mean": "KL divergence, mean",
    "kl_99": "KL divergence, 99 %",
    "top1_agreement": "same top token",
    "rms_delta_p": "RMS change of p",
    "logits_mse": "logits MSE",
}


# What the other measures are called where all are shown.
_OTHERS = {
    "nll": "negative log-likelihood",
    "kl_median": "KL divergence, median",
    "kl_95": "KL divergence, 95 %",
    "kl_99.9": "KL divergence, 99.9 %",
    "kl_max": "KL divergence, largest",
}


def named(metric: Metric) -> str:
    """What a measure is called in a table of all of them."""
    known = {**LABELS, **_OTHERS}
    if metric.name in known:
        return known[metric.name]
    for end, said in (("_recovery", "share kept"), ("_acc_norm", "accuracy, by length"), ("_acc", "accuracy")):
        if metric.name.endswith(end):
            task = metric.name.removesuffix(end)
            return f"{known.get(task, task)}, {said}"
    return metric.name


def unit(metric: Metric) -> str:
    """A measure's unit; none for a pure number."""
    return "" if metric.unit == "1" else metric.unit.replace("/", " a ")


def finite(value: Any) -> Any:
    """The same value with NaN and infinities as None: JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def to_json(report: Report) -> bytes:
    """The documented JSON, see REPORT.md."""
    return (json.dumps(finite(report.to_json()), indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def to_junit(report: Report) -> bytes:
    """One test case a gated metric. INCONCLUSIVE is an `error`, not a `failure`: the test could not decide."""
    suite = ElementTree.Element(
        "testsuite",
        name="compress evaluate",
        tests=str(len(report.verdicts)),
        failures=str(sum(v.outcome == "FAIL" for v in report.verdicts)),
        errors=str(sum(v.outcome == "INCONCLUSIVE" for v in report.verdicts)),
        skipped="0",
    )
    for verdict in report.verdicts:
        case = ElementTree.SubElement(suite, "testcase", classname="accuracy_gate", name=verdict.metric)
        if verdict.outcome != "PASS":
            tag = "failure" if verdict.outcome == "FAIL" else "error"
            ElementTree.SubElement(case, tag, type=verdict.outcome, message=_printable(verdict.reason))
        out = ElementTree.SubElement(case, "system-out")
        against = f"{report.candidate.path} against {report.reference.path}"
        out.text = _printable("\n".join([verdict_line(verdict), against, report.judged]).strip())
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def _printable(text: str) -> str:
    """Without the control characters that XML cannot hold."""
    return "".join(c if c in "\t\n\r" or ord(c) >= 32 else "?" for c in text)


def verdict_line(verdict: Verdict) -> str:
    """`perplexity: 96.4 % of the reference (95 % bounds 96.1 % and 96.7 %; 48 windows)`"""
    r = verdict.recovery
    if not math.isfinite(r.value):
        return f"{verdict.metric}: no recovery to speak of"
    return (
        f"{verdict.metric}: {r.value:.2%} of the reference "
        f"(one-sided {verdict.confidence:.0%} bounds {r.lower:.2%} and {r.upper:.2%}; {verdict.n} {verdict.counted})"
    )


def headline(report: Report) -> str:
    """The outcome in one line, or what was measured when there is no gate."""
    if report.outcome is None or report.gate is None:
        return "measured without a gate"
    rule = "" if report.gate["rule"] == "bounds" else ", point rule"
    return f"{report.outcome} at {report.gate['threshold']:.1%} with {report.gate['confidence']:.0%} confidence{rule}"


def number(value: float | None) -> str:
    """Four significant digits, or a dash."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def interval(metric: Metric) -> str:
    return "" if metric.lower is None else f"{number(metric.lower)} to {number(metric.upper)}"


def to_text(report: Report) -> str:
    """For a terminal of 100 columns."""
    out = [headline(report)] if report.gate else []
    if report.judged:
        out.append(f"judged: {report.judged}")
    for v in report.verdicts:
        out.append(f"  {v.outcome:<12} {verdict_line(v)}")
        if v.outcome == "INCONCLUSIVE":
            out.append(f"               {v.reason}")
        if v.corrected is not None:
            out.append(
                f"               above chance ({v.chance:.1%}): {v.corrected.value:.2%} ({v.corrected.lower:.2%} to "
                f"{v.corrected.upper:.2%}); McNemar p = {v.mcnemar_p:.3g}"
            )
    rows = [("", "reference", "candidate", "95 % interval")]
    for m in report.metrics:
        if m.name in LABELS or m.name.endswith(("_acc", "_acc_norm")):
            rows.append((LABELS.get(m.name, m.name), number(m.reference), number(m.value), interval(m)))
    if not report.verdicts:
        for m in report.metrics:
            if m.name.endswith("_recovery"):
                bounds = f"{m.lower:.2%} to {m.upper:.2%}"
                rows.append((m.name.replace("_recovery", " recovery"), "-", f"{m.value:.2%}", bounds))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        cells = [c.ljust(w) if i in (0, 3) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        out.append("  ".join(cells).rstrip())
    t = report.text
    out.append(
        f"{t['num_tokens']} tokens scored in {t['num_windows']} windows: context {t['context']}, stride {t['stride']}, "
        f"from position {t['min_context']}, {'with' if t['bos'] else 'without'} BOS"
    )
    finite_blocks = [b for b in report.blocks if b.snr_db is not None]
    if finite_blocks:
        falls = _largest_fall(report)
        out.append(
            f"error by depth: {finite_blocks[0].snr_db:.1f} dB after the first block, "
            f"{finite_blocks[-1].snr_db:.1f} dB after the last{falls}"
        )
    before, after = report.reference, report.candidate
    out.append(
        f"size: {before.weight_bytes / 1e6:.1f} MB -> {after.weight_bytes / 1e6:.1f} MB"
        + (f" ({after.bits_per_weight:.2f} bits a weight, all tensors)" if after.num_parameters else "")
    )
    return "\n".join([*out, *(f"note: {n}" for n in report.notes)])


def _largest_fall(report: Report) -> str:
    """Where the signal-to-noise ratio falls most from one block to the next."""
    pairs = [
        (a.snr_db - b.snr_db, b.name)
        for a, b in zip(report.blocks, report.blocks[1:], strict=False)
        if a.snr_db is not None and b.snr_db is not None
    ]
    if not pairs or max(pairs)[0] <= 0:
        return ""
    fall, name = max(pairs)
    return f"; most is lost in {name} ({fall:.1f} dB)"


def to_markdown(report: Report) -> str:
    """For a CI job's summary."""
    mark = {"PASS": "✅", "FAIL": "❌", "INCONCLUSIVE": "⚠️", None: "📏"}[report.outcome]
    out = [f"## {mark} Accuracy gate: {headline(report)}", ""]
    out.append(f"`{_cell(report.candidate.path)}` against `{_cell(report.reference.path)}`")
    if report.judged:
        out.append(f"\nJudged: {_cell(report.judged)}")
    if report.verdicts:
        out += ["", "| metric | verdict | recovery | bounds | n | |", "|---|---|---|---|---|---|"]
        for v in report.verdicts:
            out.append(
                f"| {_cell(v.metric)} | {v.outcome} | {_percent(v.recovery.value)} | {_percent(v.recovery.lower)} to "
                f"{_percent(v.recovery.upper)} | {v.n} {v.counted} | {_cell(v.reason)} |"
            )
    out += ["", "| measure | reference | candidate | 95 % interval | unit |", "|---|---|---|---|---|"]
    for m in report.metrics:
        if not m.name.endswith("_recovery"):
            cells = (number(m.reference), number(m.value), interval(m), unit(m))
            out.append(f"| {_cell(named(m))} | {' | '.join(cells)} |")
    if report.blocks:
        worst = sorted(report.blocks, key=lambda b: math.inf if b.snr_db is None else b.snr_db)[:3]
        parts = ", ".join(f"{b.name} {b.snr_db:.1f} dB" for b in worst if b.snr_db is not None)
        out += ["", f"Lowest signal-to-noise ratio after a block: {parts or 'no error at all'}"]
    t = report.text
    out += [
        "",
        f"Text `{_cell(str(t['source']))}`: {t['num_tokens']} tokens, context {t['context']}, stride {t['stride']}; "
        f"weights {report.reference.weight_bytes / 1e6:.1f} MB before, "
        f"{report.candidate.weight_bytes / 1e6:.1f} MB after.",
        *(f"- {_cell(n)}" for n in report.notes),
    ]
    return "\n".join(out) + "\n"


def _percent(value: float) -> str:
    return f"{value:.2%}" if math.isfinite(value) else "-"


def _cell(text: str) -> str:
    """Text that cannot break a Markdown table or smuggle in HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("`", "'").replace("\n", " ")
