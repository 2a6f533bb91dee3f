"""`compress int8` beside llm-compressor's and ModelOpt's INT8: same model, tokens and windows, judged as it is run.

    python tests/bench/int8.py [--rival PYTHON] [--modelopt PYTHON] [--model FOLDER --calib TEXT --data TEXT...]
        [--samples 32] [--windows 20] [--device cuda]

Without --model the bundled reference model and its texts. PYTHON is an interpreter with tests/bench/quantizers/
llmcompressor.txt (or modelopt.txt); without it only our rows. Every entry runs in a process of its own, on so many
threads. A dense copy of a quantized model hides what rounding inputs costs, so every entry is judged with its
quantizers on: ours by the streamed forward (the KV cache included), a rival by its own library's, on the same windows
beside the same original (`quantizers/inside.py`).

ratio: perplexity over the original's; its standard error is over windows. KL: from the original's predictions, mean of
a token. recovery: 1 / ratio. seconds, CPU: from rows that are there to a quantized model (for ours: verified on disk).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BENCH = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(BENCH), str(BENCH / "quantizers")]

from pool import environment, log, run_child  # noqa: E402

OURS: dict[str, dict[str, Any]] = {
    "w8a16": {"scheme": "w8a16"},
    "w8a8": {},
    "w8a8 balanced": {"effort": "balanced"},
    "w8a8 sym": {"sym_activations": True},
    "w8a8 keep-inputs": {"keep_inputs": None},
    "w8a8 + KV int8": {"kv_cache": "int8"},
    "w8a8 static": {"static": True},
    "w8a8 static + KV int8": {"static": True, "kv_cache": "int8"},
}
LLMCOMPRESSOR = {
    "llm-compressor w8a16": ["--method", "w8a16"],
    "llm-compressor w8a8 round-to-nearest": ["--method", "w8a8"],
    "llm-compressor SmoothQuant": ["--method", "smoothquant"],
    "llm-compressor SmoothQuant + GPTQ": ["--method", "smoothquant+gptq"],
    "llm-compressor SmoothQuant + GPTQ, static": ["--method", "smoothquant+gptq", "--static"],
}
MODELOPT = {
    "ModelOpt SmoothQuant, static": ["--method", "smoothquant"],
    "ModelOpt ranges alone, static": ["--method", "max"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rival", type=Path, help="python of llm-compressor's environment")
    parser.add_argument("--modelopt", type=Path, help="python of ModelOpt's environment")
    parser.add_argument("--model", type=Path, help="another model, with --calib and --data")
    parser.add_argument("--calib", help="calibration text of --model")
    parser.add_argument("--data", nargs="+", help="evaluation texts of --model; a table for each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=20, help="of --seq-len tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="entries whose name contains this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(json.loads(options.child))), flush=True)
        return
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        given = {
            **vars(options),
            "json": None,
            "child": None,
            "rival": None,
            "modelopt": None,
            "out": scratch,
            "only": "",
        }
        made = spawn({"do": "prepare", **{k: str(v) if isinstance(v, Path) else v for k, v in given.items()}}, options)
        for name, changes in OURS.items():
            if options.only in name:
                said = spawn({"do": "ours", "changes": changes, "out": str(work / "made"), **made}, options)
                rows.append({"entry": name, **said})
                keep(rows, made, options)
        for python, script, entries in (
            (options.rival, "run_int8_llmcompressor.py", LLMCOMPRESSOR),
            (options.modelopt, "run_int8_modelopt.py", MODELOPT),
        ):
            for name, words in entries.items() if python else ():
                if options.only in name:
                    rows.append({"entry": name, **rival(python, script, words, made, options)})
                    keep(rows, made, options)
    for name in rows[0]["texts"] if rows else ():
        print(f"\n{name}\n{table(rows, name)}")
    where = platform.processor() or platform.machine() if options.device == "cpu" else options.device
    print(f"{where}, {options.threads} thread(s); {made['said']}")


def keep(rows: Sequence[Mapping[str, Any]], made: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Show the newest row of each text, and write all that there is: a run may be cut off."""
    for name in rows[-1]["texts"]:
        log(f"{name}: {table(rows[-1:], name).splitlines()[-1]}")
    if options.json:
        options.json.write_text(json.dumps({"prepared": made, "rows": rows}, indent=2))


def spawn(given: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One of our own steps in a process of its own."""
    command = [sys.executable, str(BENCH / "int8.py"), "--child", json.dumps(given)]
    done = run_child(command, cwd=ROOT, environment=environment(options.threads, [ROOT], gpu=options.device != "cpu"))
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def rival(
    python: Path, script: str, words: Sequence[str], made: Mapping[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    where = ["--device", options.device]
    run = str(BENCH / "quantizers" / script)
    command = [str(python), run, made["model"], made["ids"], made["texts"], *words, *where]
    with tempfile.TemporaryDirectory() as cwd:
        done = run_child(command, cwd=Path(cwd), environment=environment(options.threads, gpu=options.device != "cpu"))
    said = json.loads(done.stdout.strip().splitlines()[-1])
    seconds = {"seconds": said["quant_seconds"], "cpu_seconds": said["cpu_seconds"]}
    return {**seconds, "peak_rss_mib": said["peak_rss_mib"], "texts": judged(said["judged"])}


# ---- children ------------------------------------------------------------------------------------------


def child(given: dict[str, Any]) -> dict[str, Any]:
    return prepare(given) if given["do"] == "prepare" else ours(given)


def prepare(given: Mapping[str, Any]) -> dict[str, Any]:
    """Calibration rows and windows as files, the same for every entry."""
    import numpy as np
    import torch

    import calibration_data
    from compress import calibration, tokens
    from compress.model import StreamedModel
    from compress.workspace import resolve
    from evaluators.windows import load_windows

    model = Path(given["model"]) if given["model"] else calibration_data.reference_model()
    source, tokenizer = resolve(str(model)), tokens.load_tokenizer(model)
    vocab_size = StreamedModel.outline(model).vocab_size
    text = calibration.load(
        given["calib"], tokenizer, num_samples=given["samples"], seq_len=given["seq_len"], seed=0, model=model,
        is_reference=source.is_reference, vocab_size=vocab_size,
    )  # fmt: skip
    kept: dict[str, Any] = {}
    for data in given["data"] or [str(calibration_data.default_evaluation())]:
        windows = load_windows(
            data, tokenizer, context=given["seq_len"], stride=None, min_context=None, bos="auto",
            max_tokens=given["windows"] * given["seq_len"], model=model, vocab_size=vocab_size,
        )  # fmt: skip
        whole = [s.ids_T for s in windows.sequences if len(s.ids_T) == len(windows.sequences[0].ids_T)]
        kept[Path(data).stem] = torch.stack([torch.as_tensor(w) for w in whole]).numpy()
    ids, texts = Path(given["out"], "ids.npy"), Path(given["out"], "texts.npz")
    np.save(ids, text.ids_NT.numpy())
    np.savez(texts, **kept)
    shapes = ", ".join(f"{len(w)} windows of {w.shape[1]} of {name}" for name, w in kept.items())
    said = f"{text.ids_NT.shape[0]} x {text.ids_NT.shape[1]} calibration tokens, {shapes}"
    recorded = {k: given[k] for k in ("calib", "samples", "seq_len", "device")}
    return {"model": str(model), "ids": str(ids), "texts": str(texts), "said": said, **recorded}


def ours(given: Mapping[str, Any]) -> dict[str, Any]:
    """Quantize, then judge as the streamed forward computes."""
    import shutil
    import time

    import torch
    from dense import Clock
    from inside import judge

    from compress.model import StreamedModel
    from compress.quantize.int8_stage import Int8Request, quantize_int8
    from compress.workspace import resolve

    class Streamed:
        """A folder with the call that `inside.judge` makes; all blocks stay loaded."""

        def __init__(self, folder: Path) -> None:
            self.model = StreamedModel.open(folder, device=given["device"])
            for index in range(self.model.num_blocks):
                self.model.load_block(index)

        def parameters(self) -> Iterator[torch.Tensor]:
            yield from self.model.blocks[0].parameters()

        def __call__(self, ids: torch.Tensor, use_cache: bool) -> Any:
            hidden = self.model.embed(ids)
            for index in range(self.model.num_blocks):
                hidden = self.model.run_block(index, hidden)
            return type("Out", (), {"logits": self.model.head(hidden)})

    out = Path(given["out"])
    shutil.rmtree(out, ignore_errors=True)
    request = Int8Request(
        source=resolve(given["model"]), out=out, calib=given["calib"], samples=given["samples"],
        seq_len=given["seq_len"], device=given["device"], **given["changes"],
    )  # fmt: skip
    original = Streamed(Path(given["model"]))  # a rival's model and library are loaded before its clock starts too
    clock, started = Clock(), time.process_time()
    quantize_int8(request)
    cpu = time.process_time() - started
    said = clock.stop()
    found = judge(Streamed(out), original, Path(given["texts"]))
    took = {"seconds": said["quant_seconds"], "cpu_seconds": cpu, "peak_rss_mib": said["peak_rss_mib"]}
    return {**took, "texts": judged(found)}


# ---- what is said --------------------------------------------------------------------------------------


def judged(found: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    return {name: figures(windows) for name, windows in found.items()}


def figures(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Means over the windows, and the standard error of the perplexity ratio."""
    import math

    gains = [a - b for a, b in zip(found["nll"], found["base_nll"], strict=True)]
    ratio = math.exp(statistics.mean(gains))
    error = ratio * statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    kl, same = statistics.mean(found["kl"]), statistics.mean(found["same_top"])
    return {"ratio": ratio, "ratio_error": error, "kl": kl, "same_top": same}


def table(rows: Sequence[Mapping[str, Any]], text: str | None = None) -> str:
    """Of one text; of the first without."""
    lines = [
        "| | perplexity ratio | KL, mean | same top token | recovery | seconds | CPU seconds | peak RSS, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        said = row["texts"][text or next(iter(row["texts"]))]
        lines.append(
            f"| {row['entry']} | {said['ratio']:.5f} +- {said['ratio_error']:.5f} | {said['kl']:.6f} | "
            f"{said['same_top']:.2%} | {1 / said['ratio']:.2%} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f} | "
            f"{row['peak_rss_mib']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    log(f"{Path(__file__).name}: one entry after the other")
    main()
