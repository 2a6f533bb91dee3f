"""Measured rows as a Markdown table: one line a method and calibration text, means over seeds.

    python tests/bench/report.py FILE.json [FILE.json ...]

prints what `rivals.py --json FILE.json` has kept. Several files must have judged FP16 in the same way; seconds of
different machines do not compare, and nothing here can tell.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metrics.perplexity import Perplexity, perplexity

RATIO_TO = ("autoawq", "autoround-sign")
COST = ("quant_seconds", "process_seconds", "cpu_seconds", "peak_rss_mib")
HEAD = ("method", "seeds", "wiki ppl", "wiki gap", "by seed", "÷ AutoAWQ", "÷ AutoRound", "novels gap", "LAMBADA %",
        "LAMBADA nll", "quant s", "process s", "CPU s", "peak RSS MiB")  # fmt: skip

Row = dict[str, Any]


def tables(rows: Sequence[Row], base: Row) -> str:
    """A table for each calibration text. base: the row of FP16, against which gaps are taken."""
    texts = list(dict.fromkeys(row["text"] for row in rows))
    parts = [fp16(base)]
    parts += [table([row for row in rows if row["text"] == text], base, text) for text in texts]
    return "\n\n".join(parts)


def fp16(base: Row) -> str:
    judged = base["judged"]
    said = ", ".join(f"{name} ppl {perplexity(nll, nll).ppl:.4f}" for name, nll in texts_of(judged).items())
    if "last_word" in judged:
        said += f", LAMBADA {100 * statistics.fmean(judged['last_word']['correct']):.2f} %"
        said += f" (nll {statistics.fmean(judged['last_word']['nll']):.4f})"
    return "FP16: " + said


def table(rows: Sequence[Row], base: Row, text: str) -> str:
    """Gaps are over FP16; the wiki gap has its paired standard error over windows, mean over seeds."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    groups = {name: sorted((r for r in rows if r["method"] == name), key=lambda r: int(r["seed"])) for name in names}
    lines = [f"Calibrated on {text}:", "", "| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for name, group in groups.items():
        ratios = [ratio(group, groups.get(other, []), base) for other in RATIO_TO]
        lines.append("| " + " | ".join(cells(name, group, base, ratios)) + " |")
    return "\n".join(lines)


def cells(name: str, group: Sequence[Row], base: Row, ratios: Sequence[str]) -> list[str]:
    wiki = [against(row, base, "wiki") for row in group]
    out = [
        name if group[0]["awq_format"] else f"{name} (not AWQ's format)",
        ",".join(str(row["seed"]) for row in group),
        f"{statistics.fmean(p.ppl for p in wiki):.4f}",
        f"{statistics.fmean(p.gap for p in wiki):+.4f} ± {statistics.fmean(p.gap_error for p in wiki):.4f}",
        " ".join(f"{p.gap:.3f}" for p in wiki),
        *ratios,
    ]
    has_novels = "novels" in base["judged"]
    out.append(f"{statistics.fmean(against(row, base, 'novels').gap for row in group):+.4f}" if has_novels else "")
    words = [row["judged"]["last_word"] for row in group if "last_word" in row["judged"]]
    out.append(f"{statistics.fmean(100 * statistics.fmean(w['correct']) for w in words):.2f}" if words else "")
    out.append(f"{statistics.fmean(statistics.fmean(w['nll']) for w in words):.4f}" if words else "")
    costs = [statistics.fmean(row["cost"][part] for row in group) for part in COST]
    return out + [f"{cost:.1f}" for cost in costs[:3]] + [f"{costs[3]:.0f}"]


def ratio(group: Sequence[Row], other: Sequence[Row], base: Row) -> str:
    """Mean wiki gap over that of `other`, over the seeds that both have; empty when there is none."""
    seeds = {row["seed"] for row in group} & {row["seed"] for row in other}
    if not seeds:
        return ""
    gaps = [statistics.fmean(against(r, base, "wiki").gap for r in g if r["seed"] in seeds) for g in (group, other)]
    return f"{gaps[0] / gaps[1]:.3f}"


def against(row: Row, base: Row, text: str) -> Perplexity:
    return perplexity(row["judged"][text], base["judged"][text])


def texts_of(judged: dict[str, Any]) -> dict[str, list[float]]:
    return {name: nll for name, nll in judged.items() if name != "last_word"}


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
