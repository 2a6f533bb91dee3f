"""Measure `compress awq` beside other people's quantizers: same model, text, windows and evaluator, one run.

    python tests/bench/rivals.py --envs DIR [--model DIR --calib TXT --eval TXT] [--only a,b] [--json FILE]

Rivals run through the peer scripts (`../shared/peers` beside the project), each in its own environment
`--envs/NAME/bin/python`. They and we start from the same folder and the first `--samples` blocks of
`--seq-len` tokens of the calibration text, and every result is made dense float32 and judged by the one
`window_nll` below. Our artifact is unpacked here in numpy from the published layout: none of our code stands
between file and figure.

Perplexity: `exp` of the mean over windows of the mean NLL of the T-1 predicted tokens (float32, T = 512). The
first 200 windows are the definition behind the reference model's published 20.186, checked on every run.

This process stays small on purpose (no torch): on Linux a child's `ru_maxrss` starts at the resident size of
the process that spawned it, so a harness with a model in memory would report its own size as everyone's peak.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"

WINDOW = 512
FIRST_WINDOWS = 200
EVAL_BATCH = 10  # windows a forward; a larger batch is no faster on a CPU

# sha256 of model.safetensors and of the evaluation text -> perplexity over the first 200 windows.
# Source: README.md of the reference model, three decimals.
PUBLISHED = {
    (
        "2e3d79ed1f4fd102b5182168aa8101b1b7b97d7907c665a916dfb2d29e6fe504",
        "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
    ): 20.186,
}

# Nibble i of a word holds column 8c + GEMM_ORDER[i] (AutoAWQ 0.2.9, awq/utils/packing_utils.py). Restated,
# not imported: a shared constant would make packer and checker wrong together.
GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GEMM_PARTS = ("qweight", "qzeros", "scales")


class Rival(NamedTuple):
    """A peer script, the environment that runs it and its own arguments."""

    name: str
    env: str
    script: str
    args: tuple[str, ...]
    transformers4: bool = False


RIVALS = (
    Rival("llmcompressor-rtn", "llmcompressor", "llmcompressor.py", ("--method", "rtn")),
    Rival("llmcompressor-awq", "llmcompressor", "llmcompressor.py", ("--method", "awq")),
    Rival("autoawq", "autoawq", "autoawq.py", ("--clip", "1"), transformers4=True),
    Rival("gptqmodel-awq", "gptqmodel", "gptqmodel.py", ("--method", "awq")),
)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What making an artifact took. MiB are 2**20 bytes.

    quant_seconds: the tool's own clock, without imports and (rivals) without loading. process_seconds: wall
    time of the process, for rivals including the peer script's dense dump. cpu_seconds: user + system of
    the process, for rivals up to the end of quantization. peak_rss_mib: likewise.
    """

    quant_seconds: float
    process_seconds: float
    cpu_seconds: float
    peak_rss_mib: float
    reported: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """One text, one model; `gap` is over FP16 and `gap_error` its paired standard error over windows."""

    windows: int
    ppl: float
    gap: float
    gap_error: float


@dataclass(frozen=True, kw_only=True)
class Row:
    method: str
    first: Perplexity
    all: Perplexity | None
    novels: Perplexity | None
    cost: Cost | None


class Finished(NamedTuple):
    """A child that ended: its stdout and what `wait4` says about it."""

    stdout: str
    seconds: float
    cpu_seconds: float
    peak_rss_mib: float


class RunFailed(Exception):
    """A child exited with an error; the message holds its command and status."""


# ---- children ---------------------------------------------------------------------------------------------


def run_child(command: Sequence[str], *, threads: int, cwd: Path) -> Finished:
    """Run a command to its end; stdout is returned, stderr passes through."""
    env = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    log("$ " + shlex.join(command))
    with tempfile.TemporaryFile("w+") as stdout:  # not a pipe: nobody reads while we wait
        started = time.monotonic()
        child = subprocess.Popen(command, stdout=stdout, cwd=cwd, env=env)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        stdout.seek(0)
        text = stdout.read()
    if child.returncode:
        log(text[-4000:])
        raise RunFailed(f"exit status {child.returncode}: {shlex.join(command)}")
    return Finished(text, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def last_json(text: str) -> dict[str, Any]:
    """The JSON object that `text` is, or its last line that is one; {} when there is none."""
    for candidate in (text, *reversed(text.splitlines())):
        try:
            value = json.loads(candidate)
        except ValueError:
            continue
        if isinstance(value, dict):
            return value
    return {}


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function that needs torch or numpy in a fresh process, to keep this one small."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


# ---- quantizers -------------------------------------------------------------------------------------------


def run_rival(rival: Rival, model: Path, options: argparse.Namespace, out: Path) -> Cost:
    """Run a peer script; `out` becomes a dense folder."""
    command = [
        str(interpreter(rival, options.envs)), str(options.peers / rival.script), str(model), str(out),
        str(options.calib), "--samples", str(options.samples), "--seqlen", str(options.seq_len), *rival.args,
    ]  # fmt: skip
    done = run_child(command, threads=options.threads, cwd=options.out)
    said = last_json(done.stdout)
    log(json.dumps(said))
    return Cost(
        quant_seconds=said["quant_seconds"],
        process_seconds=done.seconds,
        cpu_seconds=said["cpu_seconds"],
        peak_rss_mib=said["peak_rss_mib"],
        reported=said,
    )


def run_ours(extra: str, out: Path, options: argparse.Namespace, dense: Path) -> Cost:
    """`compress awq` into `out`, unpacked into `dense`."""
    command = [
        sys.executable, "-m", "compress", "awq", str(options.model), "--calib", str(options.calib),
        "--samples", str(options.samples), "--seq-len", str(options.seq_len), "-o", str(out), "--json",
        *shlex.split(extra),
    ]  # fmt: skip
    done = run_child(command, threads=options.threads, cwd=ROOT)
    said = last_json(done.stdout)
    in_own_process(write_dense, out, dense)
    return Cost(
        quant_seconds=float(said.get("seconds", math.nan)),
        process_seconds=done.seconds,
        cpu_seconds=done.cpu_seconds,
        peak_rss_mib=done.peak_rss_mib,
        reported=said,
    )


def interpreter(rival: Rival, envs: Path) -> Path:
    return envs / rival.env / "bin" / "python"


def for_transformers4(model: Path, out: Path) -> None:
    """Copy a model folder so that transformers 4 reads it as transformers 5 does.

    4.51 knows neither `rope_parameters` nor `dtype`: it would silently use rope_theta 10000 and float32.
    """
    shutil.copytree(model, out, copy_function=shutil.copyfile)
    out.chmod(0o755)  # copytree copies the mode of a folder that may be read-only
    config = json.loads((out / "config.json").read_text())
    rope = dict(config.pop("rope_parameters", {}))
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    (out / "config.json").write_text(json.dumps(config, indent=1))
    path = out / "tokenizer_config.json"
    if path.exists():
        tokenizer = json.loads(path.read_text())
        if tokenizer.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name for it
            tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(tokenizer, indent=1))


# ---- our artifact, read independently ---------------------------------------------------------------------


def unpack_gemm(words: np.ndarray) -> np.ndarray:
    """int32 `[R, C]` into the codes 0..15 `[R, 8 C]` that AutoAWQ's gemm layout holds; uint8."""
    import numpy as np

    bits = words.astype(np.uint32)
    out = np.empty((*words.shape, 8), np.uint8)
    for nibble, column in enumerate(GEMM_ORDER):
        out[:, :, column] = (bits >> np.uint32(4 * nibble)) & np.uint32(15)
    return out.reshape(words.shape[0], -1)


def dequantize_gemm(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, group: int) -> np.ndarray:
    """The float32 weight `[out, in]` of a gemm layer: `(code - zero) * scale`, transposed."""
    import numpy as np

    codes, zeros = unpack_gemm(qweight).astype(np.float32), unpack_gemm(qzeros).astype(np.float32)
    row = np.arange(codes.shape[0]) // group
    return np.ascontiguousarray(((codes - zeros[row]) * scales.astype(np.float32)[row]).T)


def write_dense(folder: Path, out: Path) -> None:
    """Turn an AutoAWQ gemm folder into a dense float32 one (config and weights, no tokenizer)."""
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    quantized = config.pop("quantization_config")
    if (quantized["quant_method"], quantized["version"], quantized["bits"]) != ("awq", "gemm", 4):
        raise RunFailed(f"{folder}: not a 4-bit AutoAWQ gemm folder: {quantized}")
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    layers = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    for layer in layers:
        qweight, qzeros, scales = (tensors.pop(f"{layer}.{part}").numpy() for part in GEMM_PARTS)
        weight = dequantize_gemm(qweight, qzeros, scales, quantized["group_size"])
        tensors[f"{layer}.weight"] = torch.from_numpy(weight)
    if not layers:
        raise RunFailed(f"{folder}: no layer is quantized")
    out.mkdir(parents=True)
    dense = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    save_file(dense, out / "model.safetensors", {"format": "pt"})
    config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config))


# ---- evaluation -------------------------------------------------------------------------------------------


def window_nll(model: Path, tokenizer: Path, text: Path, most: int | None, threads: int) -> list[float]:
    """Mean NLL (nats a token) of each of the first `most` windows of WINDOW tokens; float32 on the CPU.

    The text is tokenized line by line as the peers' `_common.py` does. Every model is given the tokenizer of
    the original, so that a rival cannot change the question by saving another one.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    encode = AutoTokenizer.from_pretrained(tokenizer)
    lines = [line + "\n" for line in text.read_text(encoding="utf8").split("\n")]
    ids = [i for line in encode(lines, add_special_tokens=False)["input_ids"] for i in line]
    windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)[:most]
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    nll: list[float] = []
    with torch.inference_mode():
        for start in range(0, len(windows), EVAL_BATCH):
            batch = windows[start : start + EVAL_BATCH]
            logits = lm(batch, use_cache=False).logits[:, :-1].transpose(1, 2)
            nll += torch.nn.functional.cross_entropy(logits, batch[:, 1:], reduction="none").mean(1).tolist()
    return nll


def perplexity(nll: Sequence[float], base: Sequence[float]) -> Perplexity:
    """Of windows `nll`, beside the same windows of FP16; the error is that of the paired difference."""
    count = len(nll)
    ppl, base_ppl = math.exp(sum(nll) / count), math.exp(sum(base) / count)
    rise = [a - b for a, b in zip(nll, base, strict=True)]
    mean = sum(rise) / count
    spread = math.sqrt(sum((r - mean) ** 2 for r in rise) / max(count - 1, 1) / count)
    return Perplexity(windows=count, ppl=ppl, gap=ppl - base_ppl, gap_error=ppl * spread)


@dataclass
class Judge:
    """Evaluates folders; the first one it sees is FP16, against which gaps are taken."""

    options: argparse.Namespace
    base: dict[Path, list[float]] = field(default_factory=dict)

    def row(self, method: str, folder: Path, cost: Cost | None) -> Row:
        o = self.options
        first = FIRST_WINDOWS
        wiki = self._nll(folder, o.eval, first if o.first_only else None)
        base = self.base[o.eval]
        novels = None
        if not o.first_only and o.novels is not None:
            novels = perplexity(self._nll(folder, o.novels, first), self.base[o.novels])
        row = Row(
            method=method,
            first=perplexity(wiki[:first], base[:first]),
            all=None if o.first_only else perplexity(wiki, base),
            novels=novels,
            cost=cost,
        )
        log(f"{method}: perplexity {row.first.ppl:.4f}, gap {row.first.gap:+.4f}")
        return row

    def _nll(self, folder: Path, text: Path, most: int | None) -> list[float]:
        o = self.options
        nll: list[float] = in_own_process(window_nll, folder, o.model, text, most, o.eval_threads)
        self.base.setdefault(text, nll)
        return nll


def check_published(row: Row, model: Path, text: Path) -> None:
    """Refuse to go on when FP16 does not give its published perplexity: then the definition has drifted."""
    shards = sorted(model.glob("*.safetensors"))
    key = (sha256(shards[0]), sha256(text)) if len(shards) == 1 else None
    if key not in PUBLISHED:
        log("no published perplexity is known for this model and text; the definition is not checked")
    elif abs(row.first.ppl - PUBLISHED[key]) > 0.0006:
        raise SystemExit(f"FP16 perplexity {row.first.ppl:.4f} is not the published {PUBLISHED[key]}")
    else:
        log(f"FP16 perplexity {row.first.ppl:.4f} matches the published {PUBLISHED[key]}")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- report -----------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Markdown; seconds are wall clock, RSS in MiB, gaps over FP16 with their paired standard error."""
    head = ("method", "ppl", "gap", "gap %", "ppl all", "gap all", "ppl novels", "gap novels",
            "quant s", "process s", "CPU s", "peak RSS MiB")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        first = row.first
        percent = 100 * first.gap / (first.ppl - first.gap)
        cells = [row.method, f"{first.ppl:.4f}", gap(first), f"{percent:.2f}"]
        for part in (row.all, row.novels):
            cells += [f"{part.ppl:.4f}", gap(part)] if part else ["", ""]
        cost = row.cost
        cells += (
            [f"{cost.quant_seconds:.1f}", f"{cost.process_seconds:.1f}", f"{cost.cpu_seconds:.1f}",
             f"{cost.peak_rss_mib:.0f}"] if cost else [""] * 4
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gap(p: Perplexity) -> str:
    return f"{p.gap:+.4f} ± {p.gap_error:.4f}"


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What a reader of the figures must know; the load average tells whether the clock can be trusted."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()} | {
        "window": WINDOW,
        "first_windows": FIRST_WINDOWS,
        "cores": os.cpu_count(),
        "load_average_at_start": os.getloadavg()[0],
    }


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def measure(options: argparse.Namespace, save: Callable[[list[Row]], None]) -> tuple[list[Row], list[str]]:
    """All rows, FP16 first, and the names of what failed or is absent. `save` is called after each row."""
    judge = Judge(options)
    rows = [judge.row("fp16", options.model, None)]
    check_published(rows[0], options.model, options.eval)
    missing: list[str] = []

    def attempt(name: str, make: Callable[[Path], Cost], dense: Path) -> None:
        if dense.exists():
            shutil.rmtree(dense)
        try:
            rows.append(judge.row(name, dense, make(dense)))
            save(rows)
        except RunFailed as error:
            log(f"FAILED {name}: {error}")
            missing.append(name)

    for rival in RIVALS:
        if not wanted(rival.name, options):
            continue
        needs = (interpreter(rival, options.envs), options.peers / rival.script)
        absent = [path for path in needs if not path.exists()]
        if absent:
            log(f"SKIPPED {rival.name}: {absent[0]} does not exist")
            missing.append(rival.name)
            continue
        model: Path = options.model
        if rival.transformers4:
            model = options.out / "source-transformers4"
            if not model.exists():
                for_transformers4(options.model, model)
        attempt(rival.name, partial(run_rival, rival, model, options), options.out / rival.name)

    for variant in options.ours:
        name, _, extra = variant.partition("=")
        if not wanted(name, options):
            continue
        packed = options.out / f"{name}-packed"
        if packed.exists():
            shutil.rmtree(packed)  # or a finished run would be resumed in no time
        attempt(name, partial(run_ours, extra, packed, options), options.out / name)
    return rows, missing


def wanted(name: str, options: argparse.Namespace) -> bool:
    return not options.only or name in options.only


def absolute(text: str) -> Path:
    """A path that still holds where a child runs; not resolved, for an environment's python is a link."""
    return Path(text).absolute()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=absolute, default=SHARED / "reference-lm")
    parser.add_argument("--calib", type=absolute, default=SHARED / "data/wikitext-2/wiki.valid.tokens.txt")
    parser.add_argument("--eval", type=absolute, default=SHARED / "data/wikitext-2/wiki.test.raw")
    parser.add_argument("--novels", type=absolute, default=SHARED / "data/novels-heldout.txt")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--envs", type=absolute, required=True, help="folder of the rivals' environments")
    parser.add_argument("--peers", type=absolute, default=SHARED / "peers", help="folder of the peer scripts")
    parser.add_argument("--only", type=lambda s: s.split(","), default=[], help="names, comma-separated")
    parser.add_argument("--ours", action="append", help="NAME=OPTIONS: a run of ours with further options")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of every quantizer")
    parser.add_argument("--eval-threads", type=int, default=1)
    parser.add_argument("--first-only", action="store_true", help="only the first 200 windows of --eval")
    parser.add_argument("--out", type=absolute, help="keep results here (default: removed at the end)")
    parser.add_argument("--json", type=absolute, help="write every figure here")
    options = parser.parse_args(argv)
    options.ours = options.ours or ["ours"]
    if not options.novels.exists():
        log(f"SKIPPED the second text: {options.novels} does not exist")
        options.novels = None
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every wanted row was measured, 1 when some are missing."""
    options = parse(argv)
    facts = settings(options)
    missing: list[str] = []

    def save(rows: list[Row]) -> None:
        if options.json:
            result = {"settings": facts, "rows": [asdict(r) for r in rows], "missing": missing}
            options.json.write_text(json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory(prefix="rivals-") as temporary:
        options.out = options.out or Path(temporary)
        options.out.mkdir(parents=True, exist_ok=True)
        rows, missing = measure(options, save)
        save(rows)
    print(table(rows))
    if missing:
        print(f"\nNot measured: {', '.join(missing)}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
