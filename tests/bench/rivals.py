"""Measure `compress awq` beside other people's quantizers: same model, tokens, threads and evaluator, one run.

    python tests/bench/rivals.py --envs DIR [--seeds 0 1 2 --text wiki=FILE.txt --text self=FILE.jsonl]
    python tests/bench/rivals.py --sites DIR --model DIR --group-size 64 --samples 128 --seeds 0 1 2 --device cuda \\
        --jobs 5 --deadline 520 --work DIR --first-window 200 --ours "best-long=--effort best OPTIONS"

Files beside this one: `methods.py` names what is compared, `quantizers/` holds one script a rival, `metrics/` one
file a metric, `texts.py` the calibration text of a seed, `report.py` the table and the targets. Rivals run in
environments of their own, NAME being llmcompressor, autoround, autoawq or gptqmodel: either `--envs`/NAME/bin/python,
or package folders for one `--python` (torch 2.13, transformers 5.17, accelerate 1.15, pandas, pyarrow, requests,
psutil and py-cpuinfo were there):

    pip install --no-deps --target SITES/NAME -r tests/bench/quantizers/NAME.txt     for each NAME, and for common

Every result is made dense float32 and judged by the same functions: perplexity, KL divergence from the original, KL on
conversations where the model has a chat template. Our artifact is unpacked by `gemm.py` from the published layout, and
its manifest must name the hash of the token ids that the rivals were given. A seed is a piece of the calibration text.

With `--jobs` above 1 quantizers run side by side, each pinned to `--threads` cores; on a GPU they share it, so that
their seconds say nothing about one of them alone (the table says so). Finished rows are kept in `--work`, and a
quantized model until it is judged, so the same command goes on after a cut; after `--deadline` seconds what still
quantizes is stopped and the rest is reported.

This process stays small on purpose (no torch): on Linux a child's `ru_maxrss` starts at the resident size of
the process that spawned it, so a harness with a model in memory would report its own size as everyone's peak.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BENCH = Path(__file__).resolve().parent
SHARED = next((f for f in (ROOT / "shared", ROOT.parent / "shared") if f.exists()), ROOT.parent / "shared")
sys.path[:0] = [str(ROOT), str(BENCH)]  # `compress` and the files beside this one, also for spawned processes

import gemm  # noqa: E402
import methods  # noqa: E402
import report  # noqa: E402
import texts  # noqa: E402
from methods import Method  # noqa: E402
from metrics import conversations  # noqa: E402
from metrics.judge import Question, judge  # noqa: E402
from metrics.perplexity import PUBLISHED, perplexity  # noqa: E402
from pool import (  # noqa: E402
    RunFailed,
    environment,
    in_own_process,
    log,
    run_child,
    run_pinned,
)

Row = dict[str, Any]


@dataclass
class Bench:
    """What all jobs share. rows and missing grow as jobs end, under the lock."""

    options: argparse.Namespace
    question: Question
    interpreters: methods.Interpreters
    code: str
    until: float | None
    base: Row
    order: list[str]
    rows: list[Row] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def job(self, method: Method, text: str, seed: int, calibration: texts.CalibrationText) -> None:
        """Measure one method on one text and seed, unless the cache has it."""
        name = f"{method.name}.{text}.{seed}"
        settings = self.settings(method, calibration)
        row = read_kept(self.options.work, name, settings)
        if row is None:
            try:
                row = {"method": method.name, "text": text, "seed": seed, "awq_format": method.awq_format}
                row |= {"settings": settings} | self.measure(method, name, calibration, settings)
            except RunFailed as error:
                log(f"FAILED {name}: {error}")
                with self.lock:
                    self.missing.append(name)
                    self.save()
                return
            write_atomically(self.options.work / f"{name}.json", row)
        wiki = report.against(row, self.base, "wiki")
        log(f"{name}: perplexity {wiki.ppl:.4f}, gap {wiki.gap:+.4f}, {row['cost']['quant_seconds']:.1f} s")
        with self.lock:
            self.rows.append(row)
            self.save()

    def measure(self, method: Method, name: str, calibration: texts.CalibrationText, settings: Row) -> Row:
        """Cost and metrics of one run. Its folders are removed when it is judged: one that was cut off before is not
        quantized again."""
        dense = self.options.out / name
        packed, paid = dense.with_name(f"{name}-packed"), dense.with_name(f"{name}.cost.json")
        cost = read_kept(self.options.out, paid.stem, settings)
        if cost is None:
            self.refuse_late()
            for folder in (dense, packed):
                shutil.rmtree(folder, ignore_errors=True)  # or a finished run of ours would be resumed in no time
            quantize = self.run_ours if method.site is None else self.run_rival
            cost = quantize(method, calibration, packed, dense) | {"jobs": self.options.jobs}
            write_atomically(paid, cost | {"settings": settings})
        self.refuse_late()
        try:
            judged = in_own_process(judge, dense, self.question)
        except Exception as error:  # from another process: a damaged result, or one that overflows
            raise RunFailed(f"{dense} cannot be judged: {type(error).__name__}: {error}") from error
        if not self.options.keep:
            for folder in (dense, packed):
                shutil.rmtree(folder, ignore_errors=True)
            paid.unlink()
        return {"cost": {key: value for key, value in cost.items() if key != "settings"}, "judged": judged}

    def refuse_late(self) -> None:
        if self.until is not None and time.monotonic() >= self.until:
            raise RunFailed("no time was left to start it, or to judge it")

    def run_rival(self, method: Method, calibration: texts.CalibrationText, packed: Path, dense: Path) -> Row:
        """Seconds are the rival's own, without imports and loading; process_seconds holds them and the dense dump.

        CPU seconds and peak memory count up to the end of quantization.
        """
        assert method.site is not None
        o = self.options
        python, folders = self.interpreters.of(method.site)
        command = [str(python), "-W", "ignore", str(BENCH / "quantizers" / method.script), str(o.model), str(dense)]
        command += [str(calibration.ids), *method.args, *(["--sym"] if o.sym else [])]
        command += ["--group-size", str(o.group_size), "--device", o.device]
        errors = o.out / f"{dense.name}.log"
        variables = environment(o.threads, folders, gpu=o.device != "cpu")
        done = run_child(command, cwd=o.out, environment=variables, errors=errors, until=self.until)
        said: Row = json.loads(done.stdout.strip().splitlines()[-1])
        return said | {"process_seconds": done.seconds}

    def run_ours(self, method: Method, calibration: texts.CalibrationText, packed: Path, dense: Path) -> Row:
        """`compress awq` into `packed`, unpacked into `dense`. CPU seconds and memory are of the whole process."""
        o = self.options
        command = [sys.executable, "-m", "compress", "awq", str(o.model), "--calib", str(calibration.text)]
        command += ["--samples", str(o.samples), "--seq-len", str(o.seq_len), "-o", str(packed), "--json"]
        command += ["--group-size", str(o.group_size), "--device", o.device, *(["--sym"] if o.sym else [])]
        command += method.args
        variables = environment(o.threads, gpu=o.device != "cpu")
        done = run_child(command, cwd=ROOT, environment=variables, until=self.until)
        said = json.loads(done.stdout)
        used = gemm.calibration_sha256(packed)
        if used != calibration.sha256:
            raise SystemExit(f"{packed} was calibrated on ids of hash {used}, the rivals on {calibration.sha256}")
        in_own_process(gemm.write_dense, packed, dense)
        return {
            "quant_seconds": float(said["seconds"]),
            "process_seconds": done.seconds,
            "cpu_seconds": done.cpu_seconds,
            "peak_rss_mib": done.peak_rss_mib,
            "reported": {key: value for key, value in said.items() if key != "record"},
        }

    def settings(self, method: Method, calibration: texts.CalibrationText) -> Row:
        """What decides a row; a kept row with other settings is measured again."""
        o = self.options
        return {
            "args": list(method.args),
            "ours": methods.effort_of(method.args) if method.site is None else None,
            "code": self.code if method.site is None else sha256(*sorted((BENCH / "quantizers").glob("*.py"))),
            "sym": o.sym,
            "group_size": o.group_size,
            "device": o.device,
            "threads": o.threads if o.device == "cpu" else None,  # of a host that only feeds the GPU
            "calibration": calibration.sha256,
            "judged": self.base["settings"],
        }

    def save(self) -> None:
        if self.options.json:
            facts = {key: str(value) for key, value in vars(self.options).items()}
            facts |= {"cores": str(os.cpu_count())}
            content = {"options": facts, "base": self.base, "rows": self.sorted_rows(), "missing": self.missing}
            write_atomically(self.options.json, content)

    def sorted_rows(self) -> list[Row]:
        """By text, method (in the order of `methods.py`) and seed."""
        return sorted(self.rows, key=lambda row: (row["text"], self.order.index(row["method"]), row["seed"]))


def read_kept(folder: Path, name: str, settings: Row) -> Row | None:
    """The row of this name, if it was measured with these settings."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    row: Row = json.loads(path.read_text())
    if row["settings"] != settings:
        changed = [key for key in settings if row["settings"].get(key) != settings[key]]
        log(f"{name} is measured again, for these have changed: {', '.join(changed)}")
        return None
    return row


def write_atomically(path: Path, content: Row) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content) + "\n")
    temporary.replace(path)


def sha256(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def judged_base(options: argparse.Namespace, question: Question) -> Row:
    """The row of FP16; refuses to go on when it does not give its published perplexity."""
    shards = sorted(options.model.glob("*.safetensors"))
    files = [*question.texts.values(), *([question.last_word] if question.last_word else [])]
    if question.conversations is not None:
        files.append(question.conversations)
    model, hashes = sha256(*shards), [sha256(file) for file in files]
    settings: Row = {
        "model": model,
        "files": hashes,
        "first": question.first,
        "windows": question.windows,
        "items": question.items,
        "device": question.device,
        "code": sha256(*sorted((BENCH / "metrics").glob("*.py"))),
    }
    row = read_kept(options.work, "fp16", settings)
    if row is None:
        row = {"settings": settings, "judged": in_own_process(judge, options.model, question)}
        write_atomically(options.work / "fp16.json", row)
    wiki = row["judged"]["texts"]["wiki"]["nll"]
    ppl = perplexity(wiki, wiki).ppl
    published = PUBLISHED.get((model, hashes[0])) if (question.first, question.windows) == (0, 200) else None
    if published is None:
        log(f"FP16 perplexity {ppl:.4f}; none is published for this model and text, so the definition is not checked")
    elif abs(ppl - published) > 0.0006:
        raise SystemExit(f"FP16 perplexity {ppl:.4f} is not the published {published}")
    else:
        log(f"FP16 perplexity {ppl:.4f} matches the published {published}")
    return row


def made_conversations(options: argparse.Namespace) -> Path | None:
    """The file of conversations, made if it is not there; None where the model has no chat template."""
    if options.conversations is not None:
        return Path(options.conversations)
    model = sha256(*sorted(options.model.glob("*.safetensors")))
    out: Path = options.work / f"conversations-{model[:8]}.json"
    if not options.questions or not options.chats:
        return None
    device = options.eval_device or options.device
    if not out.exists() and not in_own_process(
        conversations.write, options.model, options.questions, options.chats, device, out
    ):
        log("no KL on conversations: the model has no chat template")
        return None
    return out


def chosen(options: argparse.Namespace, interpreters: methods.Interpreters) -> tuple[list[Method], list[str]]:
    """The methods to measure, and the names of those whose environment is not there."""
    command = [sys.executable, "-m", "compress", "awq", "--help"]
    variables = environment(1) | {"COLUMNS": "200"}
    help_text = run_child(command, cwd=ROOT, environment=variables).stdout
    wanted = [*methods.RIVALS, *methods.ours(options.ours, help_text)]
    if options.only:
        unknown = set(options.only) - {method.name for method in wanted}
        if unknown:
            known = ", ".join(method.name for method in wanted)
            raise SystemExit(f"--only names {', '.join(sorted(unknown))}; there are {known}")
        wanted = [method for method in wanted if method.name in options.only]
    absent = interpreters.absent(wanted)
    for name, path in absent.items():
        log(f"SKIPPED {name}: {path} does not exist")
    return [method for method in wanted if method.name not in absent], list(absent)


def run(options: argparse.Namespace) -> Bench:
    """Everything that was asked for."""
    until = None if options.deadline is None else time.monotonic() + options.deadline
    question = Question(
        original=options.model,
        texts={"wiki": options.eval} | ({"novels": options.novels} if options.novels else {}),
        first=options.first_window,
        windows=options.windows,
        last_word=options.lambada if options.items != 0 else None,
        items=options.items,
        conversations=made_conversations(options),
        device=options.eval_device or options.device,
        threads=options.threads,
    )
    interpreters = methods.Interpreters(options.envs, options.sites, options.python)
    wanted, absent = chosen(options, interpreters)
    bench = Bench(
        options=options,
        question=question,
        interpreters=interpreters,
        code=sha256(*sorted((ROOT / "compress").rglob("*.py"))),
        until=until,
        base=judged_base(options, question),
        order=[method.name for method in wanted],
        missing=absent,
    )
    jobs = []
    for text, source in options.text:
        for seed in options.seeds:
            calibration = in_own_process(
                texts.write_seed, source, seed, options.samples, options.seq_len, options.model, options.out
            )
            jobs += [(method, text, seed, calibration) for method in wanted]
    jobs.sort(key=lambda job: -job[0].about_seconds)  # stable: ties keep the order of texts and seeds
    run_pinned([partial(bench.job, *job) for job in jobs], options.jobs, options.threads)
    bench.save()
    return bench


def absolute(text: str) -> Path:
    """A path that still holds where a child runs; not resolved, for an environment's python is a link."""
    return Path(text).absolute()


def listed(text: str) -> list[str]:
    return text.split(",")


def named_text(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=FILE")
    return name, absolute(path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--envs", type=absolute, help="folder of the rivals' environments")
    where.add_argument("--sites", type=absolute, help="folder of the rivals' package folders")
    parser.add_argument("--python", type=absolute, default=absolute(sys.executable), help="interpreter for --sites")
    parser.add_argument("--model", type=absolute, default=ROOT / "calibration_data/reference_lm")
    parser.add_argument("--text", type=named_text, action="append", help="NAME=FILE to calibrate on; may be repeated")
    parser.add_argument(
        "--seeds", type=listed, nargs="+", default=[["0"]], help="pieces of the text, 0 being the first"
    )
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--sym", action="store_true", help="all methods without zero points")
    parser.add_argument("--group-size", type=int, default=128, help="of all methods [128]")
    parser.add_argument("--device", default="cpu", help="where is quantized and judged: cpu or cuda [cpu]")
    parser.add_argument("--only", type=listed, nargs="+", default=[], help="names of methods, also of --ours")
    parser.add_argument(
        "--ours", action="append", default=[], help="NAME=OPTIONS: one more run of ours; may be repeated"
    )
    parser.add_argument("--threads", type=int, help="of every quantizer and evaluation [1; cuda: cores / jobs]")
    parser.add_argument("--jobs", type=int, default=1, help="quantizers side by side, each pinned to --threads cores")
    parser.add_argument("--deadline", type=float, help="seconds after which no quantizer goes on")
    parser.add_argument("--data", type=absolute, default=SHARED / "data", help="folder of the texts below")
    parser.add_argument("--eval", type=absolute, help="default: DATA/wikitext-2/wiki.test.raw")
    parser.add_argument("--novels", type=absolute, help="default: DATA/novels-heldout.txt")
    parser.add_argument("--lambada", type=absolute, help="default: DATA/lambada_test.jsonl")
    parser.add_argument("--questions", type=absolute, help="of conversations; default: DATA/piqa.jsonl")
    parser.add_argument("--conversations", type=absolute, help="the file of an earlier run's WORK, not made again")
    parser.add_argument("--windows", type=int, default=200, help="of 512 tokens, of each text")
    parser.add_argument("--first-window", type=int, default=0, help="200: none of what choices were compared on [0]")
    parser.add_argument("--chats", type=int, default=100, help="conversations; 0: none [100]")
    parser.add_argument("--items", type=int, help="of LAMBADA, 0: none; default: all")
    parser.add_argument("--eval-device", help="where is judged; default: --device")
    parser.add_argument("--work", type=absolute, help="folder of finished rows (default: removed at the end)")
    parser.add_argument("--keep", action="store_true", help="keep quantized folders and logs in WORK/work")
    parser.add_argument("--json", type=absolute, help="write every figure here, after each row")
    options = parser.parse_args(argv)
    data: Path = options.data
    options.seeds = [int(seed) for part in options.seeds for seed in part]
    options.only = [name for part in options.only for name in part]
    if options.threads is None:
        options.threads = 1 if options.device == "cpu" else max(1, len(os.sched_getaffinity(0)) // options.jobs)
    options.text = options.text or [("wiki", data / "wikitext-2/wiki.valid.tokens.txt")]
    options.eval = options.eval or data / "wikitext-2/wiki.test.raw"
    options.novels = options.novels or data / "novels-heldout.txt"
    options.lambada = options.lambada or data / "lambada_test.jsonl"
    options.questions = options.questions or data / "piqa.jsonl"
    for name in ("novels", "lambada", "questions"):
        if not getattr(options, name).exists():
            log(f"SKIPPED {name}: {getattr(options, name)} does not exist")
            setattr(options, name, None)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every wanted row was measured, 1 when some are missing."""
    options = parse(argv)
    with tempfile.TemporaryDirectory(prefix="rivals-") as temporary:
        options.work = options.work or Path(temporary)
        options.work.mkdir(parents=True, exist_ok=True)
        options.out = options.work / "work"
        options.out.mkdir(exist_ok=True)
        bench = run(options)
        if not options.keep and not bench.missing:
            shutil.rmtree(options.out)
    if bench.missing:
        print(f"Not measured: {', '.join(bench.missing)}\n")
    if bench.rows:
        print(report.tables(bench.sorted_rows(), bench.base))
    return 1 if bench.missing else 0


if __name__ == "__main__":
    sys.exit(main())
