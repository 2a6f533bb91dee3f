"""`compress auto` beside uniform artifacts: KL at equal bytes, and the smallest of each that passes the gate.

    python tests/bench/auto.py MODEL --calib TEXT --data TEXT [--device cuda] [--work FOLDER] [--out FILE]

Uniform: `compress awq` at INT4 in groups of 128, 64 and 32 (those that divide every layer's inputs), with zero points,
and at 8 bits, effort `balanced`. Auto: the best within the bytes of every uniform artifact, and within those between
the finest INT4 and INT8 at the given shares; then the smallest that passes the gate. All are judged by `compress
evaluate` on the same held-out text, and every ratio is to the best uniform artifact of at most as many bytes. A size
counts everything: scales, zero points, embeddings. Rows are kept in --work, so that a run that was cut off goes on;
seconds are those of making alone, of a row that was not kept, and include measuring for auto.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from compress.calibration_rows import weight_bytes  # noqa: E402
from compress.checkpoint import Checkpoint  # noqa: E402
from compress.cli.auto import verdict_text  # noqa: E402
from compress.cli.judges import DOUBT  # noqa: E402
from compress.devices import pick_dtype  # noqa: E402
from compress.files import json_bytes, write_bytes_atomically  # noqa: E402
from compress.model import StreamedModel  # noqa: E402
from compress.quantize.auto_stage import AutoRequest  # noqa: E402
from compress.quantize.awq_stage import AwqRequest, quantize_awq  # noqa: E402
from compress.quantize.group_size import shapes_quantized  # noqa: E402
from compress.scheme import Scheme, dividing  # noqa: E402
from compress.search import Goal, Judged, search  # noqa: E402
from compress.workspace import resolve  # noqa: E402
from evaluators.evaluate import evaluate  # noqa: E402
from evaluators.request import EvaluationRequest  # noqa: E402

Row = dict[str, Any]


class Bench:
    """What all rows share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.source = resolve(str(options.model))
        self.work: Path = options.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.until = time.monotonic() + options.deadline
        self.common = {
            "source": self.source, "calib": options.calib, "samples": options.samples, "seq_len": options.seq_len,
            "device": options.device, "dtype": pick_dtype("auto", options.device), "force": True,
        }  # fmt: skip

    def row(self, name: str, make: Callable[[Path], Row]) -> Row | None:
        """What `make` finds, kept under `name`; None where no time is left to begin it."""
        path = self.work / f"{name}.json"
        if path.exists():
            found: Row = json.loads(path.read_text())
            return found
        if time.monotonic() > self.until:
            return None
        began = time.monotonic()
        row = {"name": name, **make(self.work / name)}
        row.setdefault("seconds", time.monotonic() - began)
        write_bytes_atomically(path, json_bytes(row))
        print(line(row), flush=True)
        return row

    def uniform(self, scheme: Scheme, out: Path) -> Row:
        began = time.monotonic()
        quantize_awq(AwqRequest(out=out, scheme=scheme, **self.common))
        return {"kind": "uniform", "seconds": time.monotonic() - began, **self.judged(out)}

    def within(self, budget: int, out: Path) -> Row:
        began = time.monotonic()
        found = search(AutoRequest(out=out, **self.common), Goal(gate=None, most=budget), None)
        assert found.best is not None and found.choices is not None
        seconds = time.monotonic() - began
        predicted = {name: choice.kl for name, choice in found.choices.uniform().items()}
        labels = found.best.choice.labels
        return {
            "kind": "auto", "seconds": seconds, "predicted": found.best.choice.kl, "predicted_uniform": predicted,
            "chosen": {label: labels.count(label) for label in sorted(set(labels))}, **self.judged(out),
        }  # fmt: skip

    def smallest(self, out: Path) -> Row:
        gate = self.options.gate

        def judge(folder: Path) -> Judged:
            row = self.judged(folder, confidence=1 - DOUBT / self.options.tries)
            passes = row["lower"] >= gate
            return Judged(passes=passes, recovery=row["recovery"], lower=row["lower"], upper=row["upper"], kl=row["kl"])

        began = time.monotonic()
        found = search(AutoRequest(out=out, **self.common), Goal(gate=gate, tries=self.options.tries), judge)
        seconds = time.monotonic() - began
        assert found.best is not None and found.best.judged is not None
        print(verdict_text(found.best.judged, gate), flush=True)
        tried = [one.to_json() for one in found.tried]
        return {"kind": "smallest", "seconds": seconds, "tried": tried, **self.judged(out)}

    def judged(self, folder: Path, confidence: float = 0.95) -> Row:
        """Bytes, KL with its interval, recovery with its bounds."""
        o = self.options
        report = evaluate(
            EvaluationRequest(
                candidate=folder, reference=self.source.path, data=o.data, threshold=o.gate, max_tokens=o.max_tokens,
                confidence=confidence,
                device=o.device, cache_folder=self.work / "cache",
            )
        )  # fmt: skip
        kl = next(metric for metric in report.metrics if metric.name == "kl_mean")
        kept = report.verdicts[0].recovery
        return {
            "bytes": weight_bytes(Checkpoint.open(folder)), "kl": kl.value, "kl_low": kl.lower, "kl_high": kl.upper,
            "recovery": kept.value, "lower": kept.lower, "upper": kept.upper, "outcome": report.outcome,
        }  # fmt: skip


def line(row: Row, best: Row | None = None) -> str:
    """One row of the table."""
    ratio = f"{row['kl'] / best['kl']:6.2f} of {best['name']}" if best else ""
    return (
        f"{row['name']:<18} {row['bytes'] / 1e6:9.2f} MB  KL {row['kl']:.5f} ({row['kl_low']:.5f}-{row['kl_high']:.5f})"
        f"  recovery {row['recovery']:.2%} >= {row['lower']:.2%} {row['outcome']:<12} {row['seconds']:7.1f} s  {ratio}"
    )


def schemes(bench: Bench) -> list[Scheme]:
    """Uniform ones that divide every layer's inputs."""
    model = StreamedModel.outline(bench.source.path)
    sizes = dividing(shape[1] for shape in shapes_quantized(model).values())
    int4 = [Scheme(group_size=size) for size in sorted(sizes, reverse=True)]
    return [*int4, Scheme(num_bits=8, group_size=max(sizes), symmetric=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", help="calibration text; of the bundled model its own")
    parser.add_argument("--data", required=True, help="held-out text")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=102_400)
    parser.add_argument("--gate", type=float, default=0.98)
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.1, 0.25, 0.5])
    parser.add_argument("--no-search", action="store_true", help="budgets alone")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("auto-bench"))
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds after which nothing new is begun")
    parser.add_argument("--out", type=Path, help="copy of all rows, JSON")
    bench = Bench(parser.parse_args())
    rows = [bench.row(f"uniform-{s.label()}", lambda out, s=s: bench.uniform(s, out)) for s in schemes(bench)]
    uniform = [row for row in rows if row is not None]
    # of the coarsest there is nothing to choose
    budgets = {row["name"].removeprefix("uniform-"): row["bytes"] for row in uniform[1:-1]}
    if len(uniform) == len(rows) > 1:
        low, high = uniform[-2]["bytes"], uniform[-1]["bytes"]
        budgets.update({f"{share:g}": round(low + share * (high - low)) for share in bench.options.shares})
    found = [bench.row(f"auto-{name}", lambda out, b=b: bench.within(b, out)) for name, b in budgets.items()]
    if not bench.options.no_search:
        found.append(bench.row("smallest", bench.smallest))
    print(f"\n{bench.source.name}, gate {bench.options.gate:.1%}, {bench.options.device}")
    table = [*uniform, *(row for row in found if row is not None)]
    for row in table:
        # a mixed folder holds 16 bytes a layer more than AutoAWQ's of the same codes
        smaller = [u for u in uniform if u["bytes"] <= 1.001 * row["bytes"]]
        best = min(smaller, key=lambda u: u["kl"], default=None)
        print(line(row, None if row["kind"] == "uniform" else best))
    for row in table:
        if "predicted_uniform" in row:
            said = ", ".join(f"{name} {kl:.4f}" for name, kl in row["predicted_uniform"].items() if kl)
            print(f"{row['name']}: predicted {row['predicted']:.4f} ({said}); chosen {row['chosen']}")
    passing = min((u for u in uniform if u["outcome"] == "PASS"), key=lambda u: u["bytes"], default=None)
    print(f"smallest uniform that passes: {'none' if passing is None else passing['name']}")
    if bench.options.out is not None:
        write_bytes_atomically(bench.options.out, json_bytes({"rows": table}))


if __name__ == "__main__":
    main()
