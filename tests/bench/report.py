"""Measured rows as a Markdown table: one line a method and calibration text, mean ± spread over seeds; and targets.

    python tests/bench/report.py FILE.json [FILE.json ...]

prints what `rivals.py --json FILE.json` has kept. Several files must have judged FP16 in the same way; seconds of
different machines do not compare, and nothing here can tell. A figure is "mean ± standard deviation over seeds (paired
standard error over windows or conversations, mean over seeds)".
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metrics.perplexity import Perplexity, perplexity

Row = dict[str, Any]
Rows = Sequence[Row]
Measure = Callable[[Row], float]


def tables(rows: Rows, base: Row) -> str:
    """A table for each calibration text, and under it the targets. base: the row of FP16, which gaps are against."""
    parts = [fp16(base)]
    for text in dict.fromkeys(row["text"] for row in rows):
        groups = by_method([row for row in rows if row["text"] == text])
        parts += [f"Calibrated on {text}:", table(groups, base), *shared(groups), targets(groups, base)]
    return "\n\n".join(parts)


def by_method(rows: Rows) -> dict[str, Rows]:
    names = dict.fromkeys(row["method"] for row in rows)
    return {name: sorted((r for r in rows if r["method"] == name), key=lambda r: int(r["seed"])) for name in names}


def fp16(base: Row) -> str:
    judged = base["judged"]
    said = ", ".join(f"{name} {perplexity(t['nll'], t['nll']).ppl:.4f}" for name, t in judged["texts"].items())
    settings = base["settings"]
    where = f"windows {settings['first']} to {settings['first'] + settings['windows'] - 1} at most"
    said = f"FP16: perplexity, {where}: {said}"
    if "last_word" in judged:
        said += f"; LAMBADA {100 * statistics.fmean(judged['last_word']['correct']):.2f} %"
    return said


def table(groups: Mapping[str, Rows], base: Row) -> str:
    """Gaps and divergences are from FP16."""
    names = list(base["judged"]["texts"])
    talks = any("conversations" in row["judged"] for rows in groups.values() for row in rows)
    words = "last_word" in base["judged"]
    head = ["method", "seeds", *(f"{name} {what}" for name in names for what in ("gap", "KL"))]
    head += ["conversations KL"] * talks + ["LAMBADA %"] * words + ["quantize s", "process s", "CPU s", "peak RSS MiB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, rows in groups.items():
        cells = [name if rows[0]["awq_format"] else f"{name} (not AWQ's format)"]
        cells.append(" ".join(str(row["seed"]) for row in rows))
        for text in names:
            gaps = [against(row, base, text) for row in rows]
            cells.append(figure([g.gap for g in gaps], [g.gap_error for g in gaps], 3))
            cells.append(divergences([row["judged"]["texts"][text]["kl"] for row in rows]))
        if talks:
            cells.append(divergences([row["judged"]["conversations"] for row in rows]))
        if words:
            right = [100 * statistics.fmean(row["judged"]["last_word"]["correct"]) for row in rows]
            cells.append(figure(right, [], 2))
        for cost in ("quant_seconds", "process_seconds", "cpu_seconds"):
            cells.append(f"{statistics.fmean(row['cost'][cost] for row in rows):.1f}")
        cells.append(f"{statistics.fmean(row['cost']['peak_rss_mib'] for row in rows):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(values: Sequence[float], errors: Sequence[float], digits: int) -> str:
    said = f"{statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        said += f" ± {statistics.stdev(values):.{digits}f}"
    return said + (f" ({statistics.fmean(errors):.{digits}f})" if errors else "")


def divergences(seeds: Sequence[Sequence[float]]) -> str:
    errors = [statistics.stdev(one) / math.sqrt(len(one)) if len(one) > 1 else 0.0 for one in seeds]
    return figure([statistics.fmean(one) for one in seeds], errors, 4)


def shared(groups: Mapping[str, Rows]) -> list[str]:
    jobs = max(row["cost"].get("jobs", 1) for rows in groups.values() for row in rows)
    if jobs == 1:
        return []
    return [f"Seconds are of up to {jobs} jobs side by side: they say nothing about one of them alone."]


def measures(groups: Mapping[str, Rows], base: Row) -> dict[str, Measure]:
    """What targets are about: the gap on each text, and KL on conversations where there is a chat template."""
    out: dict[str, Measure] = {}
    for text in base["judged"]["texts"]:
        out[f"gap on {text}"] = lambda row, text=text: against(row, base, text).gap  # type: ignore[misc]
        out[f"KL on {text}"] = lambda row, text=text: statistics.fmean(row["judged"]["texts"][text]["kl"])  # type: ignore[misc]
    if all("conversations" in row["judged"] for rows in groups.values() for row in rows):
        out["KL on conversations"] = lambda row: statistics.fmean(row["judged"]["conversations"])
    return out


def targets(groups: Mapping[str, Rows], base: Row) -> str:
    """Each of ours over the rival that its effort is compared with; those rivals differ by measure, so they are named.

    `best`: AutoRound's SignRound, in no more time. `balanced`: the best rival of less than 3 times its time.
    `fast`: the best AWQ, at a tenth of its time.
    """
    head = "| ours ÷ rival, means over the seeds of both | target | " + " | ".join(measures(groups, base)) + " | time |"
    lines = ["Targets:", "", head, "|" + "---|" * (3 + len(measures(groups, base)))]
    rivals = {name: rows for name, rows in groups.items() if rows[0]["settings"].get("ours") is None}
    for name, rows in groups.items():
        effort = rows[0]["settings"].get("ours")
        among, target = {
            "best": ({n: r for n, r in rivals.items() if n == "autoround-sign"}, 0.75),
            "balanced": ({n: r for n, r in rivals.items() if seconds(r) < 3 * seconds(rows)}, 0.6),
            "fast": ({n: r for n, r in rivals.items() if n.endswith("awq")}, 0.9),
        }.get(effort or "", ({}, 0.0))
        if among:
            lines.append("| " + " | ".join(target_cells(name, rows, among, target, measures(groups, base))) + " |")
    return "\n".join(lines)


def target_cells(
    name: str, rows: Rows, among: Mapping[str, Rows], target: float, asked: Mapping[str, Measure]
) -> list[str]:
    cells, used = [], {}
    for measure in asked.values():
        ratios = {rival: ratio(rows, other, measure) for rival, other in among.items()}
        found = {rival: value for rival, value in ratios.items() if value is not None}
        if not found:
            cells.append("")
            continue
        rival = max(found, key=lambda n: found[n])  # the smallest loss of a rival
        used[rival] = seconds(rows) / seconds(among[rival])
        cells.append(f"{found[rival]:.2f} ({'met' if found[rival] <= target else 'missed'}, {rival})")
    times = ", ".join(f"{value:.2f} of {rival}" for rival, value in used.items())
    return [name, f"{target:.2f}", *cells, times]


def seconds(rows: Rows) -> float:
    return statistics.fmean(row["cost"]["quant_seconds"] for row in rows)


def ratio(rows: Rows, other: Rows, measure: Measure) -> float | None:
    """Mean over mean, over the seeds that both have; None when there is none."""
    seeds = {row["seed"] for row in rows} & {row["seed"] for row in other}
    if not seeds:
        return None
    ours, theirs = (statistics.fmean(measure(r) for r in group if r["seed"] in seeds) for group in (rows, other))
    return ours / theirs


def against(row: Row, base: Row, text: str) -> Perplexity:
    return perplexity(row["judged"]["texts"][text]["nll"], base["judged"]["texts"][text]["nll"])


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit((__doc__ or "").strip())
    kept = [json.loads(Path(file).read_text()) for file in sys.argv[1:]]
    base = kept[0]["base"]
    for file, one in zip(sys.argv[1:], kept, strict=True):
        if one["base"]["settings"] != base["settings"]:
            raise SystemExit(f"{file} was judged with other settings than {sys.argv[1]}; print them apart")
    print(tables([row for one in kept for row in one["rows"]], base))


if __name__ == "__main__":
    main()
