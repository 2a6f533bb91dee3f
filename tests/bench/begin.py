"""What begin-of-text tokens before calibration rows are worth: `compress awq` with them, and with rows cut without.

    python tests/bench/begin.py MODEL [--device cuda --group-size 64 --seeds 0 1 2 --work DIR --data DIR]

For models whose tokenizer begins a text with BOS (Gemma, Llama 3). "Without" quantizes a copy of the folder whose
tokenizer.json has no post-processor; both are judged on the same windows, each beginning with BOS, by perplexity and by
KL divergence from the original. Finished rows are kept in `--work`. The table is printed last.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BENCH = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(BENCH)]

import gemm  # noqa: E402
import report  # noqa: E402
import texts  # noqa: E402
from metrics.judge import Question, judge  # noqa: E402
from pool import RunFailed, environment, in_own_process, log, run_child  # noqa: E402
from rivals import SHARED, absolute, read_kept, sha256, write_atomically  # noqa: E402

Row = dict[str, Any]


def without_bos(model: Path, out: Path) -> None:
    """A copy of the folder (links to the weights) whose tokenizer puts nothing around a text."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for file in model.iterdir():
        if file.name != "tokenizer.json":
            (out / file.name).symlink_to(file)
    content = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    content["post_processor"] = None
    (out / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def refuse_unless_bos(model: Path, bare: Path) -> None:
    from compress.tokens import begin_id, load_tokenizer

    if begin_id(load_tokenizer(model)) is None:
        raise SystemExit(f"the tokenizer of {model} begins no text with BOS: there is nothing to compare")
    if begin_id(load_tokenizer(bare)) is not None:
        raise SystemExit(f"the tokenizer in {bare} still begins a text with BOS")


def quantized(model: Path, text: Path, packed: Path, dense: Path, options: argparse.Namespace) -> None:
    for folder in (packed, dense):
        shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "compress", "awq", str(model), "--calib", str(text), "-o", str(packed), "--json"]
    command += ["--samples", str(options.samples), "--seq-len", str(options.seq_len), "--device", options.device]
    command += ["--group-size", str(options.group_size), "--effort", options.effort]
    variables = environment(options.threads, gpu=options.device != "cpu")
    run_child(command, cwd=ROOT, environment=variables, until=options.until)
    in_own_process(gemm.write_dense, packed, dense)


def measured(name: str, model: Path, text: Path, options: argparse.Namespace, question: Question) -> Row | None:
    settings = {
        key: str(value) for key, value in vars(options).items() if key not in ("until", "deadline", "work", "seeds")
    }
    settings |= {"code": sha256(*sorted((ROOT / "compress").rglob("*.py")))}
    row = read_kept(options.work, name, settings)
    if row is not None:
        return row
    dense = options.work / f"{name}-dense"
    packed = options.work / f"{name}-packed"
    try:
        if text.exists():
            quantized(model, text, packed, dense, options)
        row = {"settings": settings, "judged": in_own_process(judge, dense if text.exists() else model, question)}
    except RunFailed as error:
        log(f"FAILED {name}: {error}")
        return None
    for folder in (dense, packed):
        shutil.rmtree(folder, ignore_errors=True)
    write_atomically(options.work / f"{name}.json", row)
    return row


def table(base: Row, rows: dict[str, list[Row]]) -> str:
    names = list(base["judged"]["texts"])
    head = ["calibration rows", "seeds", *(f"{name} {what}" for name in names for what in ("gap", "KL"))]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for kind, found in rows.items():
        cells = [kind, str(len(found))]
        for name in names:
            gaps = [report.against(row, base, name) for row in found]
            cells.append(report.figure([g.gap for g in gaps], [g.gap_error for g in gaps], 3))
            cells.append(report.divergences([row["judged"]["texts"][name]["kl"] for row in found]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=lambda s: Path(s).resolve())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="pieces of the calibration text")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--first-window", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=absolute, default=SHARED / "data")
    parser.add_argument("--deadline", type=float, help="seconds after which no quantizing goes on")
    parser.add_argument("--work", type=absolute, help="folder of finished rows (default: removed at the end)")
    return parser.parse_args()


def main() -> int:
    """0 when every row was measured."""
    options = parse()
    options.until = None if options.deadline is None else time.monotonic() + options.deadline
    with tempfile.TemporaryDirectory(prefix="begin-") as temporary:
        options.work = options.work or Path(temporary)
        options.work.mkdir(parents=True, exist_ok=True)
        bare = options.work / "no-bos"
        without_bos(options.model, bare)
        in_own_process(refuse_unless_bos, options.model, bare)
        files = {"wiki": options.data / "wikitext-2/wiki.test.raw", "novels": options.data / "novels-heldout.txt"}
        question = Question(
            original=options.model, texts=files, first=options.first_window, windows=options.windows, last_word=None,
            items=0, conversations=None, device=options.device, threads=options.threads,
        )  # fmt: skip
        base = measured("fp16", options.model, options.work / "none", options, question)
        assert base is not None
        rows: dict[str, list[Row]] = {"each begins with BOS": [], "without BOS": []}
        source = options.data / "wikitext-2/wiki.valid.tokens.txt"
        for seed in options.seeds:
            text = in_own_process(
                texts.write_seed, source, seed, options.samples, options.seq_len, options.model, options.work
            ).text
            for (kind, found), model in zip(rows.items(), (options.model, bare), strict=True):
                name = f"{kind.replace(' ', '-')}.{seed}"
                row = measured(name, model, text, options, question)
                found += [row] if row is not None else []
        print(table(base, {kind: found for kind, found in rows.items() if found}))
    return 0 if all(len(found) == len(options.seeds) for found in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
