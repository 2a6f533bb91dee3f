"""What does BOS at the front of every calibration row change, for a model whose tokenizer begins texts with it?

    python tests/bench/bos.py MODEL [--efforts fast balanced] [--seeds 0 1 2] [--device cuda] [--samples 128]

Quantizes with rows as `compress awq` makes them, and with rows of the same text without BOS, as they were until it was
noticed that evaluation windows have it; judges both on windows with BOS, as the model is used. A seed is a piece of the
calibration text (`texts.py`). The last lines are the table: perplexity lost and mean KL divergence from the original.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" if (ROOT.parent / "shared").exists() else ROOT / "shared"
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import gemm  # noqa: E402
import texts  # noqa: E402
from metrics.judge import Question, judge  # noqa: E402
from metrics.perplexity import perplexity  # noqa: E402
from pool import environment, in_own_process, log, run_child  # noqa: E402

WITHOUT = """
from compress import tokens
tokens.begin_id = lambda tokenizer: None
from compress.cli.main import main
main()
"""
WAYS = {"with BOS": ["-m", "compress"], "without": ["-c", WITHOUT]}


def quantized(asked: argparse.Namespace, way: str, effort: str, text: Path, folder: Path) -> Path:
    """The dense float32 folder of an artifact calibrated on the text."""
    packed, dense = folder / "packed", folder / "dense"
    command = [sys.executable, *WAYS[way], "awq", str(asked.model), "--calib", str(text), "-o", str(packed)]
    command += ["--samples", str(asked.samples), "--seq-len", str(asked.seq_len), "--effort", effort]
    command += ["--group-size", str(asked.group_size), "--device", asked.device]
    run_child(command, cwd=ROOT, environment=environment(asked.threads, gpu=asked.device != "cpu"), until=None)
    in_own_process(gemm.write_dense, packed, dense)
    return dense


def measure(asked: argparse.Namespace, folder: Path) -> list[str]:
    question = Question(
        original=asked.model,
        texts={"wiki": asked.data / "wikitext-2/wiki.test.raw", "novels": asked.data / "novels-heldout.txt"},
        first=asked.first_window,
        windows=asked.windows,
        last_word=None,
        items=None,
        conversations=None,
        device=asked.device,
        threads=asked.threads,
    )
    base = in_own_process(judge, asked.model, question)["texts"]
    found: dict[tuple[str, str], list[Any]] = {}
    for seed in asked.seeds:
        source = asked.data / "wikitext-2/wiki.valid.tokens.txt"
        text = in_own_process(
            texts.write_seed, source, seed, asked.samples, asked.seq_len, asked.model, folder
        ).text  # fmt: skip
        for effort in asked.efforts:
            for way in WAYS:
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    dense = quantized(asked, way, effort, text, Path(scratch))
                    found.setdefault((effort, way), []).append(in_own_process(judge, dense, question)["texts"])
                log(f"{effort} {way}, seed {seed}")
    lines = ["| | " + " | ".join(base) + " |", "|---" * (1 + len(base)) + "|"]
    for (effort, way), judged in found.items():
        cells = []
        for name in base:
            gaps = [perplexity(one[name]["nll"], base[name]["nll"]).gap for one in judged]
            kls = [statistics.fmean(one[name]["kl"]) for one in judged]
            cells.append(f"{spread(gaps, 2)} / {spread(kls, 4)}")
        lines.append(f"| {effort}, {way} | {' | '.join(cells)} |")
    return lines


def spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ({statistics.stdev(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=lambda text: Path(text).resolve())
    parser.add_argument("--data", type=lambda text: Path(text).resolve(), default=SHARED / "data")
    parser.add_argument("--efforts", nargs="+", default=["fast"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--first-window", type=int, default=200)
    parser.add_argument("--windows", type=int, default=200, help="of 512 tokens, of each text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print("\n".join(measure(asked, Path(scratch))))


if __name__ == "__main__":
    main()
